"""The demo page as a Space: a page on the Hub, which loads the model from its repository.

The Space holds the demo's source files and no weights. It runs the code in the model's repository.
"""

import importlib.metadata
from pathlib import Path

from huggingface_hub import HfApi, SpaceCard, SpaceCardData
from jinja2 import Template

import gpt2_scratch
from training.hub.repository import push_files, read_card

GRADIO_VERSION = "6.31.0"  # as in constraints.txt
_SOURCES = ("demo.css", "demo_page.py", "demo_session.py", "demo_views.py", "inspection.py")


def space_id(space: str, repo_id: str) -> str:
    """Return the id of the Space `space`: owner/name, or a name under the model's owner."""
    return space if "/" in space else f"{repo_id.split('/')[0]}/{space}"


def space_files(repo_id: str) -> dict[str, str]:
    """Return the files of the Space of the model `repo_id`: path -> content."""
    metadata = SpaceCardData(  # from which the Hub builds the Space
        title=f"{repo_id.split('/')[-1]} demo",
        emoji="🔎",
        colorFrom="blue",
        colorTo="indigo",
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        python_version="3.11",
        app_file="app.py",
        short_description="Completions, and what the model thinks at each token",
        models=[repo_id],
        pinned=False,
    )
    package = Path(gpt2_scratch.__file__).parent
    versions = {name: importlib.metadata.version(name).split("+")[0] for name in ("torch", "transformers")}
    return {
        "README.md": f"{SpaceCard.from_template(metadata, template_str=_template('card.md'), model=repo_id)}\n",
        "app.py": Template(_template("app.py"), keep_trailing_newline=True).render(model=repo_id),
        "requirements.txt": "".join(f"{name}=={version}\n" for name, version in versions.items()),
        "gpt2_demo/__init__.py": '"""The demo page."""\n',
        **{f"gpt2_demo/{source}": (package / source).read_text(encoding="utf-8") for source in _SOURCES},
    }


def _template(name: str) -> str:
    return (Path(__file__).with_name("templates") / f"space_{name}.jinja").read_text(encoding="utf-8")


def push_space(space: str, repo_id: str) -> None:
    """Push the demo page of the model `repo_id` to an existing Space, in one commit.

    A README.md that was edited on the Hub keeps its text and its other metadata.
    """
    files = space_files(repo_id)
    # A new Space has a README.md of the Hub, without a demo.
    if {"README.md", "app.py"} <= set(HfApi().list_repo_files(space, repo_type="space")):
        card = SpaceCard(read_card(space, "main", "space"), ignore_metadata_errors=True)
        card.data["sdk_version"], card.data["models"] = GRADIO_VERSION, [repo_id]
        files["README.md"] = str(card)
    contents = {name: content.encode() for name, content in files.items()}
    push_files(space, contents, f"Demo of {repo_id}", kind="space")
