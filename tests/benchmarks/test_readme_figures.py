"""The README's figures are those of the committed result they name."""

from pathlib import Path

from benchmarks.readme import SOURCE, with_results

ROOT = Path(__file__).parent.parent.parent


def test_readme_shows_the_committed_result(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    text = Path("README.md").read_text(encoding="utf-8")
    sources = set(SOURCE.findall(text))
    assert len(sources) == 1, "README.md names the one result its figures come from"
    renewed = with_results(text, Path(sources.pop()))
    assert text == renewed, "renew it: python -m benchmarks.readme benchmarks/results/NAME.json README.md"
