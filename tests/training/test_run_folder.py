"""A run's folder: checkpoints by name, occupied and cleared folders, what killed runs leave."""

import pytest

from stf_diffusers.training import run_folder


@pytest.fixture
def folder(tmp_path):
    """Checkpoints 2, 10 and 9; one without its manifest, one being written, and a folder with a checkpoint's prefix."""
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-9", "checkpoint-notes", ".saving-checkpoint-12"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "training_state.json").write_text("{}")
    (tmp_path / "checkpoint-11").mkdir()
    return tmp_path


def names(paths):
    return [path.name for path in paths]


def test_complete_checkpoints_are_in_order_of_steps(folder):
    assert names(run_folder.complete_checkpoints(folder)) == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    assert run_folder.step_of(folder / "checkpoint-10") == 10 and run_folder.step_of(folder / "checkpoint-notes") == -1


def test_the_checkpoint_that_is_asked_for(folder, tmp_path):
    assert run_folder.find_checkpoint(folder, None) is None
    assert run_folder.find_checkpoint(folder, "latest") == folder / "checkpoint-10"
    assert run_folder.find_checkpoint(folder / "empty", "latest") is None
    assert run_folder.find_checkpoint(folder, "checkpoint-10") == folder / "checkpoint-10"
    assert run_folder.find_checkpoint(folder / "empty", str(folder / "checkpoint-2")) == folder / "checkpoint-2"
    with pytest.raises(ValueError, match="later checkpoints than checkpoint-2: checkpoint-9, checkpoint-10"):
        run_folder.find_checkpoint(folder, "checkpoint-2")
    with pytest.raises(ValueError, match=r"no complete checkpoint is there; .* has: checkpoint-2, checkpoint-9"):
        run_folder.find_checkpoint(folder, "checkpoint-11")
    other = folder / "other" / "checkpoint-1"
    other.mkdir(parents=True)
    (other / "training_state.json").write_text("{}")
    with pytest.raises(ValueError, match="holds checkpoints of its own"):
        run_folder.find_checkpoint(folder, str(other))


def test_writable_folders(tmp_path):
    run_folder.check_writable(tmp_path / "new" / "below")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"output_dir=.*file is not a writable folder"):
            run_folder.check_writable(path)


def test_occupied_folders(folder, tmp_path):
    run_folder.refuse_occupied(tmp_path / "new", resuming=False)
    with pytest.raises(ValueError, match="Continue it with resume_from_checkpoint"):
        run_folder.refuse_occupied(folder, resuming=False)
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="no checkpoint to continue from"):
        run_folder.refuse_occupied(pipeline, resuming=True)


def test_clearing_removes_the_run_and_nothing_else(folder):
    for name in ("samples/step-1.png", "post_hoc_ema/x", "best/x", "evaluations.json", "model_index.json", "notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    run_folder.clear(folder)
    left = {".saving-checkpoint-12", "checkpoint-11", "checkpoint-notes", "notes.txt"}
    assert {path.name for path in folder.iterdir()} == left


def test_leftovers_and_old_latents_are_removed(folder):
    (folder / "post_hoc_ema").mkdir()
    for name in (".writing-x", "post_hoc_ema/.writing-y", "latents-a.safetensors", "latents-b.safetensors", "mine"):
        (folder / name).write_text("x")
    (folder / ".removing-checkpoint-1").mkdir()
    before = {path.name for path in folder.iterdir()}
    run_folder.remove_leftovers(folder)
    gone = {".writing-x", ".removing-checkpoint-1", ".saving-checkpoint-12"}
    assert {path.name for path in folder.iterdir()} == before - gone
    assert not list((folder / "post_hoc_ema").iterdir())
    run_folder.remove_latents(folder, folder / "latents-b.safetensors")
    assert names(folder.glob("latents-*")) == ["latents-b.safetensors"]


def test_errors_of_writing_say_where_and_how_much_room_there_is(tmp_path):
    said = rf"the samples cannot be written to {tmp_path}, where \d+\.\d MiB are free: no room"
    with pytest.raises(OSError, match=said), run_folder.explained_write_errors("the samples", tmp_path):
        raise RuntimeError("no room")
