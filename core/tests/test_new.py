"""Packages that ``plait new`` writes for every hook and domain."""

import ast
import os
import subprocess
import sys
import tomllib

import pytest
import yaml
from click.testing import CliRunner
from plait.cli import main
from plait.errors import PlaitError
from plait.hookspecs import HOOKS
from plait.new import check_domain, create, domains

DOMAINS = ["image-classification", "graph", "image-text", "restoration", "tensor", "text"]
# One package a domain, with hooks that differ between the domains.
LIVED = {
    "graph": ["attack", "transform", "optimize", "evaluate"],
    "image-text": ["attack", "load_model", "aggregate"],
    "restoration": ["ensemble", "restore"],
    "tensor": ["load_data", "attack", "ensemble", "extract_feature"],
    "text": ["load_data", "transform", "optimize"],
}
LIFE = """
import sys
import pytest
from plait.cli import main

for name in sys.argv[1:]:
    main(["check", name], standalone_mode=False)
    main(["run", f"{name}/pipelines/demo.yaml", "matrix.seed=[0]"], standalone_mode=False)
options = ["-v", "-p", "no:cacheprovider", "--import-mode=importlib", "--rootdir=.", "-k", "not conformance"]
assert pytest.main([*options, *(f"{name}/tests" for name in sys.argv[1:])]) == 0
"""


@pytest.mark.slow
def test_every_hook_is_made_for_a_domain_or_refused_with_those_that_fit(tmp_path):
    assert domains() == DOMAINS
    made = 0
    for domain in DOMAINS:
        for hook in HOOKS:
            try:
                check_domain(domain, [hook])
            except PlaitError as error:
                fitting = str(error).partition("--domain may be ")[2].split(", ")
                assert fitting
                assert domain not in fitting
                continue
            folder = create(f"my-{domain}-{hook.replace('_', '-')}", [hook], tmp_path, domain)
            made += 1
            for path in folder.rglob("*.py"):
                compile(path.read_text(), str(path), "exec", ast.PyCF_ONLY_AST)
            tomllib.loads((folder / "pyproject.toml").read_text())
            assert hook.replace("_", "-") in (folder / "README.md").read_text()
            assert yaml.safe_load((folder / "pipelines" / "demo.yaml").read_text())["steps"]
    assert made == 54


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--hook", "attack", "--domain", "text"], "no template of hook attack for text; --domain may be image-class"),
        (
            ["--hook", "attack", "--domain", "tabular"],
            "no domain 'tabular'; the domains are image-classification, graph",
        ),
        (["--hook", "attack", "--domain", "graphs"], "no domain 'graphs' (did you mean 'graph'?)"),
    ],
)
def test_domains_that_are_refused(tmp_path, options, sentence):
    done = CliRunner().invoke(main, ["new", "mine", *options, "--in", str(tmp_path)])
    assert done.exit_code == 1
    assert sentence in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_packages_of_the_domains_work_at_once(tmp_path):
    for domain, hooks in LIVED.items():
        folder = create(f"my-{domain}", hooks, tmp_path, domain)
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        information = folder / "src" / f"my_{domain.replace('-', '_')}-0.1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
        groups = project["entry-points"].items()
        lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in groups]
        (information / "entry_points.txt").write_text("".join(lines))
    names = [f"my-{domain}" for domain in LIVED]
    paths = os.pathsep.join(str(tmp_path / name / "src") for name in names)
    environment = {**os.environ, "PYTHONPATH": paths, "PLAIT_STORE": str(tmp_path / "store")}
    command = [sys.executable, "-c", LIFE, *names]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all checks passed") == len(names)
    for name in names:
        assert f"\n{name}/tests/" in done.stdout
