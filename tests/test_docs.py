"""README and docs: their code runs, and what their commands, links and tables name exists and agrees."""

import importlib.util
import pathlib
import re

import pytest
from flax import traverse_util

from experiments.common import config_fields
from experiments.configs import base

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
COMMANDS = [  # of code blocks and of code in tables
    (page, line.split("  #")[0].strip())
    for page, text in TEXTS.items()
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]+)`", text)
    for line in block.splitlines()
    if re.search(r"\bexperiments\.[a-z_]+\b", line) and "import" not in line
]
FIELDS = {".".join(name) for name in traverse_util.flatten_dict(base.get_config().to_dict())}


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if "```python" in text])
def test_python_blocks_run(page):
    for block in re.findall(r"```python\n(.*?)```", TEXTS[page], re.DOTALL):
        exec(compile(block, page, "exec"), {})


def test_links_lead_to_files_and_headings_that_exist():
    for page in PAGES:
        for target, heading in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
            if "://" in target:
                continue
            file = (page.parent / target).resolve() if target else page
            assert file.exists(), (page.name, target)
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if heading else []
            assert not heading or heading in map(_anchor, headings), (page.name, target, heading)


def _anchor(heading):
    """Return the name that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_page_is_reached_from_the_readme_and_short():
    assert len(TEXTS["README.md"].splitlines()) <= 150
    for page, text in TEXTS.items():
        assert page == "README.md" or f"]({page})" in TEXTS["README.md"], page
        assert len(text.splitlines()) <= 200 or page == "docs/configuration.md", page


def test_commands_name_modules_flags_fields_and_configurations_that_exist():
    assert len(COMMANDS) > 20
    for page, command in COMMANDS:
        where = (page, command)
        module = re.search(r"\bexperiments\.[\w.]+", command)[0].rstrip(".").replace(".", "/")
        source = (ROOT / f"{module}.py").read_text()
        for flag in re.findall(r"--([a-z][\w.]*)", command.split(module.replace("/", "."), 1)[1]):
            if flag.startswith("config."):
                assert flag.removeprefix("config.") in FIELDS, where
            elif flag.startswith("plan."):
                assert flag in FIELDS | {"plan.discount"}, where
            elif flag != "help":
                assert re.search(rf'"{flag}"|run_flags\.(new_)?{flag}\(', source), (flag, *where)
        for path, suffix in re.findall(r"(experiments/configs/\w+\.py):?([\w-]*)", command):
            spec = importlib.util.spec_from_file_location("config", ROOT / path)
            family = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(family)
            assert "-" in suffix and suffix.isupper() or family.get_config(*[suffix] if suffix else []), where


def test_scripts_that_are_named_exist():
    for page, text in TEXTS.items():
        for path in re.findall(r"\b(?:launch|experiments/(?:configs|common))/\w+\.\w+", text):
            assert (ROOT / path).is_file(), (page, path)


def test_the_page_of_all_fields_is_that_of_the_code():
    assert TEXTS["docs/configuration.md"] == config_fields.page(), (
        "run `python -m experiments.common.config_fields > docs/configuration.md`"
    )


def test_figures_of_the_readme_stand_in_the_results():
    rows = re.search(r"\| task \|.*?\n\n", TEXTS["README.md"], re.DOTALL)[0]
    results = TEXTS["docs/results.md"]
    figures = re.findall(r"\d+(?: ± \d+)?%?", re.sub(r"^\| [^|]* \|", "|", rows, flags=re.MULTILINE))
    assert len(figures) > 15
    for figure in figures:
        assert figure in results or figure == "0%", figure
