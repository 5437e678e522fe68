"""Docstrings as the website's reference shows them: a griffe extension, named in mkdocs.yml."""

import griffe
import website


class Docstrings(griffe.Extension):
    "Lists where a docstring describes arguments line by line, and links of names in backticks."

    def __init__(self):
        self.known = website.known_names()

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            here = f"api/{obj.module.path.removeprefix('minirl_nb.')}.md"
            obj.docstring.value = website.docstring(obj.docstring.value, here, self.known)
