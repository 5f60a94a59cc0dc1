"""docs/api.md is up to date, and the examples of docstrings and of the README run.

The examples name a released checkpoint and photos. Here these names lead to the shipped shapes
model and to a rendered scene.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import functools
import io
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import jax
import pytest
from PIL import Image

import pixellm_jax
from data_pipeline.sources.shapes.dataset import Shapes
from pixellm_jax import Predictor
from pixellm_jax.inference.prepare import prepare_for_inference
from tests.support.scripts import load_script

write_api_docs = load_script("write_api_docs")
draw_rooms = load_script("draw_rooms")

ROOT = Path(__file__).parents[1]
SHAPES_MODEL = ROOT / "pixellm_jax" / "assets" / "shapes_model"
PHOTOS = ("a.jpg", "desk.jpg", "photo.jpg")
CHECKER = doctest.OutputChecker()
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files that examples name."""
    path = tmp_path_factory.mktemp("examples")
    for name in ("pixellm-7b", "pixellm-13b"):
        (path / name).symlink_to(SHAPES_MODEL)
    (path / "configs").symlink_to(ROOT / "configs")
    image = Image.open(io.BytesIO(Shapes(split="val")[0].image)).convert("RGB")
    for name in PHOTOS:
        image.save(path / name)
    return path


@pytest.fixture(scope="module", autouse=True)
def one_predictor():
    """Load equal checkpoints once, and compile fast: most of the time is compilation."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    load = functools.cache(Predictor.load)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Predictor, "load", load)
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def names(folder):
    """Variables that examples use without defining them."""
    with contextlib.chdir(folder):
        predictor = Predictor.load("pixellm-7b")
    image = Image.open(folder / "photo.jpg")
    request, _ = predictor.prepare(image, "Where is the cup?")
    return {
        "image": image,
        "request": request,
        "requests": [request],
        "predictor": predictor,
        "model": pixellm_jax.load_model(folder / "pixellm-7b"),
        "prepare_for_inference": prepare_for_inference,
        "vocabulary": predictor.vocabulary,
        "engine": predictor.engine,
    }


def find_examples() -> Iterator[tuple[str, str]]:
    """Yield (module, docstring) for every docstring with `>>>` in the packages."""
    for path in draw_rooms.modules(*draw_rooms.PACKAGES):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Expr(value=ast.Constant(value=str(text))) if ">>>" in text:
                    yield draw_rooms.module_name(path), text


def run_examples(text: str, variables: dict[str, object]) -> None:
    """Run the `>>>` lines of a docstring, and compare what they print where it is stated."""
    for example in doctest.DocTestParser().get_examples(text):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(example.source, "example", "single"), variables)
        if example.want:
            got = printed.getvalue()
            assert CHECKER.check_output(example.want, got, FLAGS), f"{example.source}printed {got}"


def test_the_page_is_up_to_date():
    text = write_api_docs.DOCUMENT.read_text(encoding="utf-8")
    assert text == write_api_docs.page(), "run `python scripts/write_api_docs.py --write`"


def test_the_page_has_every_public_name():
    names = {*write_api_docs.public_names(), "__version__"}
    assert names == set(pixellm_jax.__all__)


EXAMPLES = list(find_examples())


@pytest.mark.parametrize(("module", "text"), EXAMPLES, ids=[module for module, _ in EXAMPLES])
def test_examples_of_docstrings_run(module, text, folder, names, monkeypatch):
    monkeypatch.chdir(folder)
    run_examples(text, vars(import_module(module)) | names)


def test_python_of_the_readme_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    variables: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), variables)
    assert capsys.readouterr().out


SOURCE = '''
class A:
    """A thing.

    Example:
        >>> A(1)

    Attributes:
        size: in
            pixels.
    """

    size: int = 3

    def f(self, x: int, *rest: str, flag: bool = True, **options: float) -> None:
        """Do it.

        Raises:
            queue.Full: no room.
        """

    def _g(self):
        """Hidden."""
'''


def test_renders_a_class():
    (node,) = ast.parse(SOURCE).body
    assert list(write_api_docs.field_rows(node)) == ["| `size` | `int` | `3` | in pixels. |"]
    text = write_api_docs.render_docstring(ast.get_docstring(node), without="Attributes")
    assert "```pycon\n>>> A(1)\n```" in text and "pixels" not in text
    text = "\n".join(write_api_docs.methods(node))
    assert "A.f(x: int, *rest: str, flag: bool = True, **options: float) -> None" in text
    assert "- `queue.Full`: no room." in text and "_g" not in text


def test_long_signatures_have_a_line_per_parameter():
    (node,) = ast.parse(f"def {'f' * 80}(a, b=1, /, c=2, *, d): pass").body
    lines = write_api_docs.signature(node).splitlines()
    assert [line.strip() for line in lines[1:]] == ["a,", "b=1,", "/,", "c=2,", "*,", "d,", ")"]
