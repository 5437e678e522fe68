"""Does another version of vLLM have the names that the vLLM engine uses? Read from its sources,
without installing or running it.

    pip download --no-deps vllm==0.33.0 -d wheel && unzip -q wheel/vllm-*.whl -d wheel/src
    python tests/check_vllm_sources.py wheel/src

Each row of the tables in `minirl_nb.vllm.names` is looked up with ast: the module's file, the class
(following its bases
into other modules), the method, function or field, and the arguments.
Exit status 1 if something is missing that a machine with a GPU needs.
"""

import ast
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from minirl_nb.vllm.names import ENGINE, SERVER

NAMES = ENGINE + SERVER


class Sources:
    def __init__(self, root):
        self.root = Path(root)
        if not (self.root / "vllm" / "__init__.py").is_file():
            sys.exit(
                f"{root} holds no vllm/__init__.py: give the folder into which the wheel was "
                "unpacked"
            )
        self.tree = cache(self._tree)

    def file(self, module):
        path = self.root.joinpath(*module.split("."))
        return next(
            (p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None
        )

    def _tree(self, module):
        file = self.file(module)
        return file and ast.parse(file.read_text(encoding="utf-8"))

    def imported(self, module, name):
        "(module, name) from which `module` imports `name`, if it does."
        package = module if self.file(module).name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(self.tree(module)):
            if not isinstance(node, ast.ImportFrom):
                continue
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            source = ".".join(x for x in (base, node.module) if x)
            for a in node.names:
                if (a.asname or a.name) == name:
                    return source, a.name
        return None

    def find(self, module, name):
        "(module, node) of a top-level name, followed through imports; None where it is not."
        seen = set()
        while module and (module, name) not in seen and self.tree(module):
            seen.add((module, name))
            for node in self.tree(module).body:
                if (
                    isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                    and node.name == name
                ):
                    return module, node
                targets = (
                    node.targets
                    if isinstance(node, ast.Assign)
                    else [node.target]
                    if isinstance(node, ast.AnnAssign)
                    else []
                )
                if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                    return module, node
            module, name = self.imported(module, name) or (None, name)
        return None

    def bases(self, module, node):
        "The class and its bases, those of vLLM, as (module, node)."
        yield module, node
        for b in node.bases:
            b = b.value if isinstance(b, ast.Subscript) else b
            found = self.find(module, b.id) if isinstance(b, ast.Name) else None
            if found and isinstance(found[1], ast.ClassDef):
                yield from self.bases(*found)

    def member(self, module, node, name):
        for _, c in self.bases(module, node):
            for item in c.body:
                if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and item.name == name:
                    return item
                if (
                    isinstance(item, ast.AnnAssign)
                    and isinstance(item.target, ast.Name)
                    and item.target.id == name
                ):
                    return item
                if isinstance(item, ast.Assign) and any(
                    isinstance(t, ast.Name) and t.id == name for t in item.targets
                ):
                    return item
        return None

    def arguments(self, module, node):
        """Names that a function takes, or a class's constructor: arguments of __init__, or its
        fields where it has none."""
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            return {
                x.arg
                for x in (
                    *a.posonlyargs,
                    *a.args,
                    *a.kwonlyargs,
                    *filter(None, (a.vararg, a.kwarg)),
                )
            }
        init = self.member(module, node, "__init__")
        if init is not None:
            return self.arguments(module, init)
        return {
            i.target.id
            for _, c in self.bases(module, node)
            for i in c.body
            if isinstance(i, ast.AnnAssign) and isinstance(i.target, ast.Name)
        }

    def problem(self, module, path, arguments):
        "None where one of the paths (`new or old`) is there; else what is wrong with the last."
        found = [self._problem(module, p, arguments) for p in path.split(" or ")]
        return None if None in found else found[-1]

    def _problem(self, module, path, arguments):
        if self.file(module) is None:
            return "its module is gone"
        first, *inner = path.split(".")
        found = self.find(module, first)
        if found is None:
            return f"{first} is gone"
        where, node = found
        for name in inner:
            node = self.member(where, node, name)
            if node is None:
                return f"{first} has no {name}"
        takes = self.arguments(where, node) if arguments else set()
        missing = [a for a in arguments if a not in takes]
        return f"takes no {', '.join(missing)}" if missing else None


def main(root):
    sources, failed = Sources(root), False
    for module, path, arguments, where in NAMES:
        problem = sources.problem(module, path, arguments)
        failed |= bool(problem) and where != "cpu"
        print(
            f"{'ok  ' if not problem else 'GONE' if where != 'cpu' else 'cpu '} {module}.{path}"
            + (f": {problem}" if problem else "")
        )
    print(
        f"{len(NAMES)} names checked; "
        + ("some that a GPU needs are gone" if failed else "all that a GPU needs are there")
    )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) if len(sys.argv) == 2 else __doc__)
