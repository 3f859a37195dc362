"""A real run is pushed to a hub on loopback: what is uploaded, and that the token is in no other place."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_hub import COMMIT, CREATE, fake_hub
from ranks import BACKENDS, MODES, Bench

CANARY = "hf_plantedPlantedPlantedPlanted"
PUSHED = ["--push-to-hub", "--username", "me", "--max-steps", "2", "--eval-steps", "2", "--save-steps", "2"]
# NO_PROXY: a proxy of the site would get requests for loopback too. "0" turns off the bench's offline mode.
ENVIRON = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "WANDB_MODE": "offline", "NO_PROXY": "127.0.0.1"}


def files_with(text: str, root: Path) -> list[Path]:
    return [p for p in root.rglob("*") if p.is_file() and text.encode() in p.read_bytes()]


def test_two_ranks_push_once_without_leaking_the_token(bench: Bench):
    pytest.importorskip("wandb", reason="the optional package wandb is not installed")
    with fake_hub() as hub:
        flags = [*BACKENDS["ddp"], *MODES["lora"], *PUSHED, "--log", "wandb"]
        done = bench.train("pushed", *flags, HF_TOKEN=CANARY, HF_ENDPOINT=hub.endpoint, **ENVIRON)
    assert done.code == 0, done.out + done.err
    assert f"pushed: {hub.endpoint}/me/pushed" in done.out

    repository = hub.repositories["me/pushed"]
    assert repository.private and len(repository.commits) == len(hub.sent(CREATE)) == 1
    assert {"adapter_model.safetensors", "tokenizer.json", "README.md"} <= set(repository.files)
    assert not [file for file in repository.files if "/" in file or file in ("run.json", "training_args.bin")]
    assert {request.authorization for request in hub.sent(COMMIT)} == {f"Bearer {CANARY}"}

    card = repository.files["README.md"].decode()
    assert card == (done.folder / "README.md").read_text()
    assert "| train | 40 |" in card and "| eval_loss |" in card and "- transformers: " in card
    assert not any(str(bench.root).encode() in content for content in repository.files.values())
    assert files_with("learning_rate", done.folder / "wandb")  # the tracker's files can be searched
    assert files_with(CANARY, bench.root) == []
    assert CANARY not in done.out + done.err


def test_a_refused_token_ends_the_run_and_keeps_the_model(bench: Bench, tmp_path):
    token = tmp_path / "token"
    token.write_text(CANARY + "\n")
    with fake_hub() as hub:
        hub.fail(401, message="Invalid credentials in Authorization header")
        flags = [*BACKENDS["one"], *PUSHED]
        environ = {"HF_TOKEN_PATH": str(token), "HF_ENDPOINT": hub.endpoint, **ENVIRON}
        done = bench.train("refused", *flags, **environ)
    assert done.code == 10
    assert "trained and saved; upload failed: push_to_hub: me/refused: the hub refuses the token" in done.err
    assert "The model is safe in refused" in done.err
    assert hub.repositories == {} and hub.sent(CREATE)[0].authorization == f"Bearer {CANARY}"
    assert (done.folder / "model.safetensors").is_file() and (done.folder / "README.md").is_file()
    assert files_with(CANARY, bench.root) == []
    assert CANARY not in done.out + done.err
