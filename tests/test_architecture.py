"""The rules of the house that a program can check: rooms, imports, legend, file sizes, paths."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import jaxtyping
import pytest

from pixellm_jax.axes import AXES, LOGICAL
from tests.support.scripts import load_script

draw_rooms = load_script("draw_rooms")
imports, module_name, modules, room = (
    draw_rooms.imports,
    draw_rooms.module_name,
    draw_rooms.modules,
    draw_rooms.room,
)

ROOT = Path(__file__).parents[1]
PACKAGES = draw_rooms.PACKAGES
LAUNCHERS = ("scripts", "configs")  # above all rooms; nobody imports them
LONGEST_FILE = 500
SHORTEST_FILE = 40
SHORT_FILES = {
    "pixellm_jax.__main__": "`python -m pixellm_jax` needs a file of this name",
    "pixellm_jax.errors": "the contract's errors, which every room imports",
    "data_pipeline.errors": "the errors of every reader",
    "pixellm_jax.cli.report": "one file per command",
}
"""Files below `SHORTEST_FILE` lines that stay files of their own, with the reason."""

MAX_CLI_LINES = 2500

# The layer rule: a room imports from the rooms before it and from itself. Rooms of one tier never
# meet, nor do the pairs of `STRANGERS`. The files beside the rooms are the contract.
TIERS = (
    ("contract",),
    ("images", "text"),
    ("model",),
    ("weights",),
    ("inference",),
    ("evaluation",),
    ("training",),
    ("report", "perf", "server"),
    ("experiments",),
    ("cli",),
)
STRANGERS = ({"training", "inference"},)
DATA_PIPELINE_SEES = {"contract", "images", "text"}
SEES_DATA_PIPELINE = {"experiments", "cli"}
TIER = {name: tier for tier, names in enumerate(TIERS) for name in names}
BOXES = {
    f"pixellm_jax.model.{box}"
    for box in ("vision_encoder", "language_model", "codebook", "pixel_decoder", "pixellm")
}
FIGURE = "pixellm_jax.model.pixellm"
BANNED = {"torch", "torchvision", "tensorflow"}
# Packages that may be imported inside a function: optional ones, and one that imports PyTorch, too,
# where that is installed.
EXTRAS = {"apache_beam", "matplotlib", "openai", "rouge_score", "tensorboardX", "wandb"}
# What one module compares with, where that is installed; also inside its functions alone.
PEERS = {"pixellm_jax.perf.baseline": {"torch", "transformers"}}

ANNOTATIONS = {
    name
    for name, kind in vars(jaxtyping).items()
    if isinstance(kind, type) and issubclass(kind, jaxtyping.AbstractDtype)
}
# Long axis names: the words of the legend that have no letter.
WORDS = LOGICAL - {axis.logical for axis in AXES.values()}
LETTERS = set(AXES)

# Hosts that a link may name. Add the host of a public page that a reader should open.
HOSTS = {
    "arxiv.org",
    "bottosson.github.io",
    "docs.astral.sh",
    "docs.jaxtyping.org",
    "flax.readthedocs.io",
    "github.com",
    "huggingface.co",
    "keepachangelog.com",
    "semver.org",
    "www.apache.org",
}
TEXT = {".cfg", ".ini", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}
# A folder of one machine; written so that this file does not contain what it looks for.
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:work|root|farm|home/\w+)(?:/|\b)|\bfile:/" + "/")
URL_HOST = re.compile(r"\bhttps?://([\w-]+(?:\.[\w-]+)+)")


def violations(module: str, source: str) -> list[str]:
    """Every rule that `source`, standing as `module`, breaks."""
    tree = ast.parse(source)
    found = []
    if module.rpartition(".")[2] == "utils":
        found.append("a file is named after what is in it, not `utils`")
    if module.startswith(PACKAGES):
        if len(source.splitlines()) > LONGEST_FILE:
            found.append(f"{len(source.splitlines())} lines, at most {LONGEST_FILE}: split it")
    for line, target in imports(tree):
        found += [f"line {line}: imports {target}: {why}" for why in import_faults(module, target)]
    found += [f"line {line}: {fault}" for line, fault in placed_imports(module, tree)]
    found += [f"line {line}: {fault}" for line, fault in legend_faults(tree)]
    return [f"{module}: {fault}" for fault in found]


def import_faults(module: str, target: str) -> Iterator[str]:
    package, top = module.partition(".")[0], target.partition(".")[0]
    if target.startswith("."):
        yield "write the absolute name"
    if top in BANNED - PEERS.get(module, set()):
        yield "only tests may import it"
    if top in LAUNCHERS:
        yield "nobody imports scripts or configs"
    if top == "tensorflow_datasets" and package == "pixellm_jax":
        yield "only data_pipeline may import it"
    if module in BOXES - {FIGURE} and target in BOXES:
        yield "the boxes of the model are siblings"
    if module == draw_rooms.FACE:
        return  # tests/test_public_face.py: it imports nothing before a name is used
    if package in PACKAGES and top in PACKAGES and not may_import(room(module), room(target)):
        yield f"{room(module)} may not import {room(target)}"


def may_import(own: str, other: str) -> bool:
    """The layer rule."""
    if own == "data_pipeline":
        return other in DATA_PIPELINE_SEES | {own}
    if other == "data_pipeline":
        return own in SEES_DATA_PIPELINE
    return own == other or (TIER[other] < TIER[own] and {own, other} not in STRANGERS)


def placed_imports(module: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Imports inside functions that belong to the top of the file, and the other way round."""
    functions = (
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    inner = {found for function in functions for found in imports(function)}
    peers = PEERS.get(module, set())
    for line, target in sorted(inner):
        if target.partition(".")[0] not in EXTRAS | peers:
            yield line, f"imports {target} inside a function: only optional extras may be"
    for line, target in sorted(set(imports(tree)) - inner):
        if target.partition(".")[0] in peers:
            yield line, f"imports {target} at the top: it may be absent, import it where it is used"


def legend_faults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Axis names of annotations and letters of einsums that the legend does not have."""
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(
                value=ast.Name(id=name) | ast.Attribute(attr=name),
                slice=ast.Tuple(elts=[_, ast.Constant(value=str(shape))]),
            ) if name in ANNOTATIONS:
                unknown = axis_names(shape) - LETTERS - WORDS
            case ast.Call(
                func=ast.Name(id="einsum") | ast.Attribute(attr="einsum"),
                args=[ast.Constant(value=str(shape)), *_],
            ):
                unknown = set(re.findall("[A-Za-z]", shape)) - LETTERS
            case _:
                continue
        if unknown:
            yield node.lineno, f"{sorted(unknown)} in {shape!r}: not in pixellm_jax/axes.py"


def axis_names(shape: str) -> set[str]:
    """Names in a shape: "*b {size} 2*y ... 3" -> {"b", "y"}."""
    return set(re.findall(r"[A-Za-z_]\w*", re.sub(r"\{[^{}]*\}", "", shape)))


@pytest.mark.parametrize("path", modules(*PACKAGES, *LAUNCHERS), ids=module_name)
def test_module_follows_the_rules(path):
    assert violations(module_name(path), path.read_text(encoding="utf-8")) == []


def test_no_module_imports_itself_through_others():
    TopologicalSorter(draw_rooms.module_graph()).prepare()  # raises CycleError


def test_every_room_has_a_tier():
    assert draw_rooms.room_graph().keys() - {"data_pipeline"} == TIER.keys() - {"server"}


def test_the_figure_of_the_rooms_is_that_of_the_imports():
    text = draw_rooms.DOCUMENT.read_text(encoding="utf-8")
    assert draw_rooms.insert_figure(text) == text and draw_rooms.figure() in text, (
        "run `python scripts/draw_rooms.py --write`"
    )


def line_count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_short_files_have_a_reason():
    files = [path for path in modules(*PACKAGES) if path.name != "__init__.py"]
    short = {module_name(path) for path in files if line_count(path) < SHORTEST_FILE}
    assert short == SHORT_FILES.keys()


def test_the_contract_and_the_command_line_stay_small():
    assert len(list((ROOT / "pixellm_jax").glob("*.py"))) <= 16
    assert sum(map(line_count, modules("pixellm_jax/cli"))) < MAX_CLI_LINES


def test_every_folder_of_a_package_is_installed():
    folders = {path.parent for path in modules(*PACKAGES)}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def tracked_files() -> list[Path]:
    """Files that git tracks or would track; everything where there is no git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return [path for path in ROOT.rglob("*") if path.is_file()]
    return [ROOT / name for name in done.stdout.split("\0") if (ROOT / name).is_file()]


def foreign_text(text: str) -> list[str]:
    """Paths of one machine, and hosts that are not in `HOSTS`."""
    paths = [match.group() for match in MACHINE_PATH.finditer(text)]
    return paths + [host for host in URL_HOST.findall(text) if host not in HOSTS]


def test_files_name_no_machine():
    found = {}
    for path in tracked_files():
        if path.suffix in TEXT or path.parent == ROOT / ".ci":
            foreign = foreign_text(path.read_text(encoding="utf-8"))
            if foreign:
                found[str(path.relative_to(ROOT))] = foreign
    assert found == {}


GOOD = [
    ("pixellm_jax.training.losses", "import jax\nfrom pixellm_jax.model.pixellm import PixelLM\n"),
    ("pixellm_jax.model.codebook", "from pixellm_jax.model import layers\n"),
    ("pixellm_jax.cli.train", "from data_pipeline.loader import load\n"),
    ("pixellm_jax.cli.main", "from pixellm_jax.cli import segment\n"),
    ("data_pipeline.loader", "import tensorflow_datasets\nfrom pixellm_jax.batch import Batch\n"),
    ("scripts.train", "from pixellm_jax.cli.main import main\n"),
    ("pixellm_jax.batch", 'x: Float[Array, "b *m 3 {size + 1} 2*y ... frequency"]\n'),
    ("pixellm_jax.training.losses", 'jnp.einsum("...btd,vd->...btv", x, w)\n'),
    ("pixellm_jax.perf.baseline", "def f():\n    import torch\n    import transformers\n"),
]


@pytest.mark.parametrize(("module", "source"), GOOD)
def test_accepts(module, source):
    assert violations(module, source) == []


BAD = [
    ("pixellm_jax.axes", "import pixellm_jax.images.rle", "contract may not import images"),
    ("pixellm_jax.model.codebook", "from pixellm_jax.model import vision_encoder", "siblings"),
    ("pixellm_jax.model.codebook", "from pixellm_jax.model.pixellm import PixelLM", "siblings"),
    (
        "pixellm_jax.training.loop",
        "import pixellm_jax.inference.engine",
        "may not import inference",
    ),
    ("pixellm_jax.inference.engine", "import pixellm_jax.training.loop", "may not import training"),
    ("pixellm_jax.images.read", "import pixellm_jax.text.prompt", "images may not import text"),
    (
        "pixellm_jax.training.loop",
        "from data_pipeline.loader import load",
        "training may not import data_pipeline",
    ),
    (
        "data_pipeline.loader",
        "from pixellm_jax.training.losses import dice",
        "data_pipeline may not import training",
    ),
    ("data_pipeline.loader", "from pixellm_jax.model.layers import x", "may not import model"),
    ("pixellm_jax.model.utils", "", "named after what is in it"),
    ("pixellm_jax.training.loop", "import configs.pixellm_7b", "nobody imports scripts or configs"),
    ("configs.pixellm_13b", "from configs import pixellm_7b", "nobody imports"),
    ("pixellm_jax.weights.torch_layout", "import torch", "only tests may import it"),
    (
        "pixellm_jax.weights.torch_layout",
        "from torch.nn import functional",
        "only tests may import it",
    ),
    ("data_pipeline.loader", "def f():\n    import tensorflow as tf", "only tests may import it"),
    ("pixellm_jax.cli.bench", "def f():\n    import torch", "only tests may import it"),
    ("pixellm_jax.perf.baseline", "import torch", "at the top"),
    ("pixellm_jax.perf.baseline", "def f():\n    import tensorflow", "only tests may import it"),
    ("pixellm_jax.training.loop", "import tensorflow_datasets", "only data_pipeline may import it"),
    ("pixellm_jax.weights.torch_layout", "def f():\n    import json", "inside a function"),
    (
        "pixellm_jax.weights.torch_layout",
        "class A:\n    async def f(self):\n        import json",
        "inside a",
    ),
    ("pixellm_jax.weights.torch_layout", "from . import errors", "write the absolute name"),
    ("pixellm_jax.weights.torch_layout", "x = 1\n" * 501, "501 lines"),
    ("pixellm_jax.batch", 'x: Float[Array, "b Q"]', "['Q'] in 'b Q'"),
    ("pixellm_jax.batch", 'x: jaxtyping.UInt8[np.ndarray, "batch y"]', "['batch'] in"),
    ("pixellm_jax.batch", 'x: Int[Array, "4*W"] | None', "['W'] in"),
    ("pixellm_jax.training.losses", 'jnp.einsum("bQ->b", x)', "['Q'] in"),
]


@pytest.mark.parametrize(("module", "source", "message"), BAD)
def test_refuses(module, source, message):
    assert any(message in fault for fault in violations(module, source))


@pytest.mark.parametrize(
    "text", ["cd /{}ork/x", "see `/{}oot`", "http{}://pypi.example.net/simple"]
)
def test_refuses_text(text):
    fill = {"cd": "w", "see": "r"}.get(text.split()[0], "s")
    assert foreign_text(text.format(fill))


@pytest.mark.parametrize("text", ["frame/work", "~/work/x", "../work/", "https://arxiv.org/"])
def test_accepts_text(text):
    assert foreign_text(text) == []
