"""``plait new``: a complete, working package for a method, from the templates of its hooks."""

from __future__ import annotations

import functools
import keyword
import re
from pathlib import Path
from typing import Any

import yaml

from plait import API
from plait.catalogue import catalogue, offers
from plait.errors import PlaitError, nearest
from plait.hookspecs import HOOKS

DEFAULT_DOMAIN = "image-classification"
# Domains whose packages begin with the digits of plait.demo; those of the others have small data and a model of their own.
OF_DIGITS = {
    "inputs": ("plait.demo.models", "images_of"),
    "values": ("plait.demo.models", "images_of"),
    "labels": ("plait.demo.models", "labels_of"),
    "with_values": ("plait.demo.pictures", "with_images"),
}
OWN = {
    "inputs": "inputs_of", "values": "values_of", "labels": "labels_of", "with_values": "with_values", "part": "part", "replaced": "replaced",
}  # fmt: skip
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def templates() -> Path:
    """Where the templates are: in the wheel, or in the checkout."""
    shipped = Path(__file__).with_name("templates")
    return shipped if shipped.is_dir() else Path(__file__).parents[2] / "templates"


def domains() -> list[str]:
    """Names of the domains, the default one first."""
    found = sorted(folder.name for folder in (templates() / "domains").iterdir())
    return sorted(found, key=lambda name: name != DEFAULT_DOMAIN)


def check_domain(domain: str, hooks: list[str]) -> None:
    """Raise PlaitError unless there is such a domain, and all hooks have a template in it."""
    if domain not in domains():
        raise PlaitError(
            f"there is no domain {domain!r}{nearest(domain, domains()) or '; the domains are ' + ', '.join(domains())}"
        )
    for hook in hooks:
        fitting = [one for one in domains() if hook in _about_domain(one)["hooks"]]
        if domain not in fitting:
            raise PlaitError(
                f"there is no template of hook {hook.replace('_', '-')} for {domain}; --domain may be {', '.join(fitting)}"
            )


def check_name(name: str, hooks: list[str]) -> None:
    """Raise PlaitError unless a package and a method may have this name."""
    if not NAME.fullmatch(name) or keyword.iskeyword(name.replace("-", "_")):
        raise PlaitError(f"{name!r} cannot be a package's name; use lower-case letters and digits in words joined by -")
    if name in catalogue() or f"plait-{name}" in catalogue():
        raise PlaitError(f"the catalogue has a package for {name!r} already; choose another name")
    for hook in hooks:
        taken = [o.package for o in offers(hook) if o.name == name]
        taken += [p for p, entry in catalogue().items() if name in entry.get("methods", {}).get(hook, ())]
        if taken:
            raise PlaitError(f"method {name!r} of hook {hook} is taken by {taken[0]}; choose another name")
    if name.replace("-", "_") in ("plait", "torch", "datasets", "numpy", "test", "tests"):
        raise PlaitError(f"{name!r} would hide another package; choose another name")


def create(name: str, hooks: list[str], parent: Path, domain: str = DEFAULT_DOMAIN) -> Path:
    """Write the package into ``parent / name``.

    Args:
        name: of the package and of its methods, in lower case with dashes.
        hooks: at least one hook.
        domain: what the methods work on, one of :func:`domains`.

    Raises:
        PlaitError: the name is not allowed or taken, a hook or the domain is unknown or they do not go together, or
            the folder exists.
    """
    hooks = list(dict.fromkeys(hook.replace("-", "_") for hook in hooks))
    shown = [hook.replace("_", "-") for hook in HOOKS]
    for hook in hooks:
        if hook not in HOOKS:
            raise PlaitError(
                f"there is no hook {hook!r}{nearest(hook.replace('_', '-'), shown) or '; the hooks are ' + ', '.join(shown)}"
            )
    check_domain(domain, hooks)
    check_name(name, hooks)
    folder = parent / name
    if folder.exists():
        raise PlaitError(f"{folder} exists already; choose another name or folder")
    facts = _facts(name, hooks, domain)
    try:
        for source, target in _files(facts):
            target_path = folder / target
            target_path.parent.mkdir(parents=True, exist_ok=True)
            target_path.write_text(source, encoding="utf-8")
    except OSError as error:
        raise PlaitError(f"{folder} cannot be written: {error.strerror}") from error
    return folder


def _about_domain(domain: str) -> dict[str, Any]:
    text = (templates() / "domains" / domain / "about.yaml").read_text(encoding="utf-8")
    about: dict[str, Any] = yaml.safe_load(text)
    return about


def _words(domain: str, package: str) -> dict[str, Any]:
    """How a domain's data and methods are called in the templates."""
    about = _about_domain(domain)
    is_own = (templates() / "domains" / domain / "data.py.jinja").exists()
    words = {**about, "domain": domain, "is_own": is_own, "items": f"{about['item']}s", "keeps_target": not is_own}
    if is_own:
        return words | {
            "inputs": "inputs", "values": "values", "rows": "data", "layer": "hidden", "take": "part(inputs, rows)",
            "load": lambda name: f"inputs_of({name}, run.device)",
            "kit": lambda *roles: "",
            "own": lambda *roles: f"from {package}.data import {', '.join(sorted(OWN[role] for role in roles))}\n",
            "toy": f"{package}.demo", "source": "Source", "model": "Model", "domain_imports": about.get("imports"),
        }  # fmt: skip
    return words | {
        "inputs": "images", "values": "images", "rows": "digits", "layer": "layers.2", "take": "images[rows]",
        "load": lambda name: f"images_of({name}).to(run.device)",
        "kit": _of_digits,
        "own": lambda *roles: "",
        "toy": "plait.demo.methods", "source": "Digits", "model": "SmallClassifier", "type": "Tensor",
    }  # fmt: skip


def _of_digits(*roles: str) -> str:
    """Import lines for what plait.demo has for some roles."""
    names: dict[str, list[str]] = {}
    for role in roles:
        module, name = OF_DIGITS[role]
        names.setdefault(module, []).append(name)
    return "".join(f"from {module} import {', '.join(sorted(some))}\n" for module, some in sorted(names.items()))


def _folder_of(hook: str, words: dict[str, Any]) -> Path:
    """The templates of a hook: the domain's, else those of domains with data of their own, else everybody's."""
    root = templates()
    places = [root / "domains" / str(words["domain"]), *([root / "own"] if words["is_own"] else []), root]
    return next(place / "hooks" / hook for place in places if (place / "hooks" / hook).is_dir())


def _facts(name: str, hooks: list[str], domain: str) -> dict[str, Any]:
    package = name.replace("-", "_")
    words = _words(domain, package)
    camel = "".join(part.capitalize() for part in name.split("-"))
    several = len(hooks) > 1
    methods = []
    for hook in hooks:
        folder = _folder_of(hook, words)
        text = (folder / "about.yaml").read_text(encoding="utf-8")
        for placeholder, word in {"ROWS": words["rows"], "ITEM": words["item"], "LAYER": words["layer"]}.items():
            text = text.replace(placeholder, word)
        about = yaml.safe_load(text)
        cls = camel + ("".join(part.capitalize() for part in hook.split("_")) if several else "")
        module = f"plugin/{hook}.py" if several else "plugin.py"
        methods.append(
            {
                "hook": hook,
                "key": hook.replace("_", "-"),
                "name": name,
                "cls": cls,
                "module": module,
                "folder": folder,
                "target": f"{package}.{module.removesuffix('.py').replace('/', '.')}:{cls}",
                "readme_step": about["step"].replace("NAME", name),
                "summary": about["summary"],
                "algorithm": about["algorithm"],
            }
        )
    return {
        **words,
        "name": name,
        "package": package,
        "api": API,
        "methods": methods,
        "summaries": list(dict.fromkeys(m["summary"] for m in methods)),
    }


def _files(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Content and path of every file of the package."""
    package, methods = facts["package"], facts["methods"]
    steps: list[str] = []
    files = []
    for method in methods:
        for template in sorted(method["folder"].glob("*.jinja")):
            text = _render(template, {**facts, **method})
            file = template.name.removesuffix(".jinja")
            if file == "steps.yaml":
                steps += [line for line in text.splitlines() if line.strip() and line not in steps]
            elif file == "test_algorithm.py":
                files.append((text, f"tests/test_{method['algorithm']}"))
            elif file == "plugin.py":
                files.append((text, f"src/{package}/{method['module']}"))
            else:
                files.append((text, f"src/{package}/{file}"))
    if len(methods) > 1:
        files.append(('"""The package\'s methods, one file a hook."""\n', f"src/{package}/plugin/__init__.py"))
    if facts["is_own"]:
        for folder in (templates() / "domains" / facts["domain"], templates() / "own"):
            for template in sorted(folder.glob("*.jinja")):
                files.append((_render(template, facts), f"src/{package}/{template.name.removesuffix('.jinja')}"))
    skeleton = templates() / "skeleton"
    for template in sorted(skeleton.rglob("*.jinja")):
        target = str(template.relative_to(skeleton)).removesuffix(".jinja")
        target = target.replace("src/", f"src/{package}/")
        files.append((_render(template, {**facts, "steps": "\n".join(_distinct_steps(steps))}), target))
    return files


def _distinct_steps(lines: list[str]) -> list[str]:
    """Steps of several hooks in one pipeline: the first of each name, the others if they differ under another name."""
    seen: dict[str, str] = {}
    for line in lines:
        step = line.split(":", 1)[0]
        seen.setdefault(step, line)
    return list(seen.values())


def _render(template: Path, facts: dict[str, Any]) -> str:
    return str(_environment().from_string(template.read_text(encoding="utf-8")).render(**facts))


@functools.cache
def _environment() -> Any:
    from jinja2 import Environment, StrictUndefined

    # The output is source code, not HTML.
    return Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
