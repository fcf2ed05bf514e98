"""Shell completion: every option that takes a model, data, a recipe or a method completes names."""

import pytest
import typer

from vitarium.cli.app import app
from vitarium.cli.completion import complete_data, complete_models

COMMANDS = typer.main.get_command(app).commands
WORDS = {
    "model": ("swin_p", "swin_pico"),
    "models": ("swin_p", "swin_pico"),
    "data": ("dig", "digits"),
    "recipe": ("multilabel_p", "multilabel_pico"),
    "methods": ("pitom", "pitome"),
    "apply": ("pitom", "pitome"),
}
EXCEPT = {("recipes", "recipe"), ("methods", "methods"), ("search", "data")}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_names_are_completed(command):
    for parameter in COMMANDS[command].params:
        if parameter.name in WORDS and (command, parameter.name) not in EXCEPT:
            begun, wanted = WORDS[parameter.name]
            context = COMMANDS[command].make_context(command, [], resilient_parsing=True)
            found = [item.value for item in parameter.shell_complete(context, begun)]
            assert wanted in found, f"vitarium {command}: {parameter.name}"


def test_lists_complete_their_last_name():
    assert "convnext_pico,swin_pico" in complete_models("convnext_pico,swin_p")


def test_data_may_be_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dinner" / "soup").mkdir(parents=True)
    (tmp_path / "dish.txt").touch()
    assert complete_data("di") == ["digits", "dinner/"]
    assert complete_data("dinner/") == ["dinner/soup/"]
    assert complete_data("[") == []
