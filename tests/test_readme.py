"""The README's code runs as it stands, and what its commands name exists."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_links_and_figures_of_the_pages_exist():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#\s]+)", page.read_text())]
    assert len(pages) > 2 and len(links) > 5
    for page, link in links:
        assert "://" in link or (page.parent / link).exists(), (page, link)


def test_commands_name_modules_scripts_and_configurations_that_exist():
    commands = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
    modules = re.findall(r"\b(experiments\.\w+)", commands)
    files = re.findall(r"(?:launch|experiments/configs)/\w+\.\w+", commands)
    assert len(modules) > 5 and len(files) > 5
    for path in [f"{module.replace('.', '/')}.py" for module in modules] + files:
        assert (ROOT / path).is_file(), path


def test_flags_of_the_commands_are_defined_by_their_modules():
    commands = re.findall(r"python -m (experiments\.\w+) (.*)", README)
    for module, arguments in commands:
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        for flag in re.findall(r"--([a-z_0-9]+)=", arguments):
            assert re.search(rf'"{flag}"|run_flags\.(new_)?{flag}\(', source), (module, flag)
