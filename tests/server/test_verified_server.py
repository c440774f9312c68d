"""`tandem verify --url` against `tandem serve`: the server is compared with the certificate of an export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from servers import serving

from tandem.__main__ import main
from workspace import Workspace


def test_our_own_server_is_compared(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the export, with other weights, and with another chat template."""
    out, template, rounded = (str(tmp_path / name) for name in ("out", "template", "rounded"))
    assert main(["export", str(workspace.hf), out, "--no-verify"]) == 0
    for folder in (template, rounded):
        shutil.copytree(out, folder)
    config = Path(template, "tokenizer_config.json")
    content = json.loads(config.read_text())
    content["chat_template"] = content["chat_template"].replace("<think>\\n\\n</think>\\n\\n", "")
    config.write_text(json.dumps(content))
    weights: dict[str, torch.Tensor] = load_file(f"{rounded}/model.safetensors")
    halved = {name: tensor.bfloat16().float() for name, tensor in weights.items()}
    save_file(halved, f"{rounded}/model.safetensors", {"format": "pt"})

    def verify(url: str, model: str) -> tuple[int, str]:
        capsys.readouterr()
        return main(["verify", out, "--url", url, "--model", model]), capsys.readouterr().out

    with serving({"out": out, "template": template, "rounded": rounded}) as server:
        code, printed = verify(server.url, "out")
        assert code == 0, printed
        assert "not compared: log-probabilities" not in printed
        code, printed = verify(server.url, "template")
        assert (code, printed.count("DIFFERENT: ")) == (1, 1)
        assert "DIFFERENT: other template: 3 of 3 conversations are not asked as in training" in printed
        code, printed = verify(server.url, "rounded")
        assert (code, printed.count("DIFFERENT: ")) == (1, 1)
        assert "DIFFERENT: rounding: " in printed
