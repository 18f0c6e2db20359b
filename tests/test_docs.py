"""README and docs: their code runs, and what their commands, links and tables name exists and agrees."""

import ast
import importlib.util
import itertools
import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from flax import traverse_util

from experiments.common import config_fields
from experiments.configs import base

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
FIELDS = {".".join(name) for name in traverse_util.flatten_dict(base.get_config().to_dict())}
PARTS = {name.split(".")[0] for name in FIELDS if "." in name}
COMMANDS = {path.stem for path in (ROOT / "experiments").glob("[a-z]*.py")}


def _without_blocks(text):
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if "```python" in text])
def test_python_blocks_run(page):
    for block in re.findall(r"```python\n(.*?)```", TEXTS[page], re.DOTALL):
        exec(compile(block, page, "exec"), {})


def test_worked_examples_have_as_many_lines_as_the_page_says():
    counts = []
    for page, text in TEXTS.items():
        for before, block in re.findall(r"\n\n((?:[^\n]+\n)+)\n```python\n(.*?)```", text, re.DOTALL):
            for said in re.findall(r"\b(\d+) lines\b", before):
                counts.append(int(said))
                assert counts[-1] == sum(map(bool, map(str.strip, block.splitlines()))), (page, before)
    assert len(counts) > 3


def test_links_lead_to_files_and_headings_that_exist():
    for page in TEXTS:
        for target, heading in re.findall(r"(?:\]\(|src=\")([^)#\s\"]*)#?([^)\s\"]*)[)\"]", TEXTS[page]):
            if "://" not in target:
                assert _path(page, target).exists(), (page, target)
                assert not heading or heading in _sections(_path(page, target).read_text()), (page, target, heading)


def _path(page, target):
    """Return the file that a link of a page leads to."""
    return ((ROOT / page).parent / target).resolve() if target else ROOT / page


def _sections(text):
    """Return the text below each heading, subsections included, by the name that GitHub gives the heading."""
    text = _without_blocks(text)
    found = {}
    for heading in re.finditer(r"^(#+) (.*)$", text, re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading[2].lower()).replace(" ", "-")
        end = re.search(rf"^#{{1,{len(heading[1])}}} ", text[heading.end() :], re.MULTILINE)
        found[name] = text[heading.end() :][: end.start() if end else None]
    return found


def test_every_page_is_reached_from_the_readme_and_short():
    assert len(TEXTS["README.md"].splitlines()) <= 150
    for page, text in TEXTS.items():
        assert page == "README.md" or f"]({page})" in TEXTS["README.md"], page
        assert len(text.splitlines()) <= 200 or page == "docs/configuration.md", page


def test_commands_take_the_arguments_that_are_written():
    """Flags, their values, fields of the configuration, and configurations: of blocks, code in the text, docstrings."""
    pages = {page: text for page, text in TEXTS.items() if page != "docs/configuration.md"}  # is made from the code
    lines = [(page, *line) for page, text in pages.items() for line in _lines_of_page(text)]
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        lines += [(path.name, *line) for line in _lines_of_docstring(ast.get_docstring(ast.parse(path.read_text())))]
    assert len(lines) > 200
    tried = [(command, *_filled_in(arguments)) for _, command, arguments in lines]
    different = list(dict.fromkeys(tried))
    command = [sys.executable, "-m", "tests.command_lines"]
    done = subprocess.run(command, input=json.dumps(different), capture_output=True, text=True, cwd=ROOT)
    assert not done.returncode, done.stderr
    complaints = dict(zip(different, json.loads(done.stdout), strict=True))
    wrong = [(line, complaints[each]) for line, each in zip(lines, tried, strict=True) if complaints[each]]
    assert not wrong, "\n".join(map(str, wrong))


def _lines_of_page(text):
    """Yield the command and the arguments of each command line; "" for flags and fields whose command is not said.

    The fields of a paragraph, or of a row of a table, are one line: some need each other.
    """
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield from _commands_of_line(line.split("  #")[0])
    for paragraph in re.split(r"\n\n|\n(?=[|-] )", _without_blocks(text)):
        fields = []
        for code in re.findall(r"`([^`]+)`", paragraph):
            code = " ".join(code.split())
            name, _, value = code.partition("=")
            first, *rest = code.split()
            if "experiments." in code or "launch/quickstart.sh" in code:
                yield from _commands_of_line(code)
            elif first in COMMANDS and rest and all(word.startswith("--") for word in rest):
                yield first, rest
            elif all(word.startswith("--") for word in shlex.split(code)) and not _is_of_other_programs(code):
                yield "", shlex.split(code)
            elif name.split(".")[0] in PARTS and "." in name and (value or not _is_function(name)):
                fields.append(f"--config.{name}={value}".rstrip("="))
        if fields:
            yield "", fields


def _lines_of_docstring(text):
    text = re.sub(r"\n +(?=\[?--|\\\n)", " ", (text or "").replace("\\\n", " "))  # lines that go on
    for line in re.findall(r"python -m experiments\.\w+[^\n]*", text):
        yield from _commands_of_line(re.sub(r"[\[\]]|  #.*|`.*", "", line))


def _commands_of_line(line):
    line = re.sub(r"launch/quickstart\.sh", "experiments.quickstart", line)
    words = [each for word in shlex.split(line.replace("...", "")) for each in _braces(word)]
    modules = [i for i, word in enumerate(words) if re.fullmatch(r"experiments\.\w+", word)]
    if modules and words[0] != "for":
        swept = [word.split(",")[0] for word in words[: modules[0]] if "sweep.sh" in line and word.startswith("--")]
        yield words[modules[0]].removeprefix("experiments."), words[modules[0] + 1 :] + swept


def _braces(word):
    """Expand {a,b} in a word as bash does."""
    match = re.search(r"\{([^{}]+,[^{}]*)\}", word)
    return [word[: match.start()] + each + word[match.end() :] for each in match[1].split(",")] if match else [word]


def _filled_in(arguments):
    """Put values where a page has N, x,y, a planner of the reader's or a choice, and leave out what stands for many."""
    filled_in = []
    for argument in arguments:
        name, _, value = argument.replace("baselines.NAME", "baselines.bc").partition("=")
        value = {"N": "1", "X": "1", "Y": "2", "x,y": "1,2", "NAME": "", "first": "reward"}.get(value, value)
        value = value.split("|")[0].strip('"')
        if name.startswith("--config.") and not value:
            field = name.removeprefix("--config.").rstrip(".*")
            assert any(f"{each}.".startswith(f"{field}.") for each in FIELDS), argument
        elif value or not argument.endswith(("=", ".", "*", "FIELD", "--help")):
            filled_in.append(f"{name}={value}" if value else name)
    return filled_in


def _is_of_other_programs(flags):
    """Whether these are flags of XLA or of the launch scripts."""
    scripts = "".join(path.read_text() for path in (ROOT / "launch").glob("*.sh"))
    return flags.startswith("--xla_") or re.search(rf"(?<![\w-]){flags}(?![\w-])", scripts)


def _is_function(name):
    """Whether this is a name of a module of the library, not a field."""
    module, _, attribute = name.partition(".")
    return importlib.util.find_spec(f"tt_jax.{module}") and hasattr(
        importlib.import_module(f"tt_jax.{module}"), attribute
    )


def test_scripts_that_are_named_exist():
    for page, text in TEXTS.items():
        for path in re.findall(r"\b(?:launch|experiments/(?:configs|common))/\w+\.\w+", text):
            assert (ROOT / path).is_file(), (page, path)


def test_the_page_of_all_fields_is_that_of_the_code():
    assert TEXTS["docs/configuration.md"] == config_fields.page(), (
        "run `python -m experiments.common.config_fields > docs/configuration.md`"
    )


def test_figures_beside_a_link_to_a_section_stand_in_it():
    """In a sentence or a row of a table with the link, or in a table that a sentence with the link introduces."""
    num_figures = 0
    for page, text in TEXTS.items():
        if page == "docs/configuration.md":
            continue
        introduction = ""
        for block in re.split(r"\n{2,}", _without_blocks(text)):
            is_table = block.startswith("|")
            parts = block.splitlines() if is_table else re.split(r"(?<=[.:])\s+(?=[A-Z*`\[])", block)
            for part in parts:
                sections = _linked_sections(page, part) or (_linked_sections(page, introduction) if is_table else "")
                if sections:
                    figures = _figures(part)
                    num_figures += len(figures)
                    known = _figures(sections)
                    missing = [each for each in figures if not any(_is_rounded(each, other) for other in known)]
                    assert not missing, (page, part, missing)
            introduction = "" if is_table else parts[-1]
    assert num_figures > 40


def _linked_sections(page, text):
    links = re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", text)
    return "\n\n".join(_sections(_path(page, target).read_text())[heading] for target, heading in links)


def _figures(text):
    """Return the numbers of a text, with errors and percent signs, but for those in links, code and names."""
    text = re.sub(r"\]\([^)]*\)|`[^`]*`|arXiv [\d.]+", "", text.replace("*", ""))
    return re.findall(r"(?<![\w.,\-])\d[\d,]*(?:\.\d+)?(?: ± \d+(?:\.\d+)?)?%?(?![\w\-])", text)


def _is_rounded(figure, other):
    """Whether a figure is the other one, or that one with fewer decimals or without its error."""
    if figure.endswith("%") != other.endswith("%"):
        return False
    pairs = itertools.zip_longest(*(each.rstrip("%").replace(",", "").split(" ± ") for each in (figure, other)))
    for short, exact in pairs:
        if short is None or short == exact:
            continue
        decimals, more = (len(each.partition(".")[2]) for each in (short, exact or ""))
        if more <= decimals or abs(float(short) - float(exact)) > 0.5001 * 10**-decimals:
            return False
    return True


def test_tables_agree_where_rows_and_columns_have_the_same_names():
    found, num_twice = {}, 0
    for page, text in TEXTS.items():
        for number, table in enumerate(re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)):
            head, _, *rows = map(_cells, table.splitlines())
            for name, *row in rows:
                for column, cell in zip(head[1:], row, strict=True):
                    if re.search("[a-z]", name) and re.search("[a-z]{3}", column) and re.search(r"\d", cell):
                        # Rows of one table may stand in another as columns.
                        first = found.setdefault(frozenset((name, column)), (cell, page, number))
                        num_twice += first[1:] != (page, number)
                        assert first[0] == cell or first[1:] == (page, number), (page, name, column, cell, first)
    assert num_twice > 5


def _cells(row):
    """Return the cells of a row without links, code and bold."""
    plain = re.sub(r"\]\([^)]*\)|[*\[\]`]", "", row.lower())
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", plain)[1:-1]]


def test_scores_in_the_docstrings_of_configurations_stand_in_the_results():
    results = _figures(TEXTS["docs/results.md"])
    for path in (ROOT / "experiments" / "configs").glob("*.py"):
        for figure in _figures(ast.get_docstring(ast.parse(path.read_text())) or ""):
            assert "±" not in figure or figure in results, (path.name, figure)
