"""README.md and docs/: examples run on a small model; links, headings, flags exist; the README is short."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import typer
from transformers import AutoModelForCausalLM

from tests.tiny_models import FAMILIES, save_checkpoint
from wanda_fast.cli import flags
from wanda_fast.cli import main as cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "LOG.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def folder(tmp_path, monkeypatch, pydoc_text, short_pydoc):
    """The working directory, with a small model in out/dense."""
    save_checkpoint(FAMILIES["llama2"](), tmp_path / "out" / "dense", pydoc_text[:20000])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(page, language):
    """The page's code in that language, with the small model and short windows in place of the real ones."""
    code = re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for name, small in ((MODEL, "out/dense"), ("seqlen=512", "seqlen=64"), ("--seqlen 512", "--seqlen 64")):
        code = [block.replace(name, small) for block in code]
    return code


def pruned_weight(folder):
    return AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.up_proj.weight


def test_the_readme_from_python(folder, capsys):
    (example,) = blocks("README.md", "python")
    exec(example, {})
    sparsity, dense, pruned = map(float, capsys.readouterr().out.split())
    assert abs(sparsity - 0.5) < 0.01 and dense > 0 and pruned > 0
    weight = pruned_weight("out/pruned")
    assert abs((weight == 0).float().mean().item() - 0.5) < 0.02


def test_the_readme_from_the_command_line(folder, monkeypatch, capsys):
    lines = "\n".join(blocks("README.md", "sh")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("wanda-fast ")]
    assert [words[1] for words in commands] == ["prune", "inspect", "doctor"]
    for words in commands:
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert not exit.value.code, capsys.readouterr()
    weight = pruned_weight("out/smollm2-50")
    assert abs((weight == 0).float().mean().item() - 0.5) < 0.02


def test_the_usage_page_from_python(folder, capsys):
    sweep, example = blocks("docs/usage.md", "python")
    exec(sweep, {})
    assert capsys.readouterr().out.count("'pruned'") == 3
    exec(example, {})
    assert capsys.readouterr().out.startswith("0.5 ")
    assert (pruned_weight("out/pruned").view(-1, 4).count_nonzero(1) == 2).all()


def test_the_readme_stays_short():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 120
    assert len(page.split()) <= 900


def test_every_flag_that_a_page_names_exists():
    commands = typer.main.get_command(cli.app).commands.values()
    known = {name for command in commands for option in command.params for name in option.opts}
    known |= {"--help", "--no-build-isolation", "--orders"}  # typer's, pip's, compare_sparsegpt's
    known |= {"--nproc-per-node", "--nnodes"}  # torchrun's
    known |= {"--steps", "--batch", "--no-bf16"}  # those of benchmarks.quality.small_moe
    known |= {f"--{alias}" for alias in flags.ALIASES}
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        named = re.findall(r"(?<![\w-])--[a-z][\w-]+", page.read_text(encoding="utf-8"))
        assert {flag.replace("_", "-") for flag in named} <= known, page.name


def test_the_usage_page_names_every_flag_of_prune():
    named = re.findall(r"`(--[a-z][\w-]+)", (ROOT / "docs" / "usage.md").read_text(encoding="utf-8"))
    prune = typer.main.get_command(cli.app).commands["prune"]
    known = {option.opts[0] for option in prune.params if option.opts[0].startswith("--")}
    assert known <= {flag.replace("_", "-") for flag in named}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if heading:
            assert heading in headings(target), f"{page.name} links to {link}"


def headings(page):
    """The anchors that GitHub gives to the page's headings."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in found}
