"""The command line as scripts and people use it: formats, contract keys, streams, options."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from powerplan.accounting import Accounting
from powerplan.cli import main
from powerplan.hardware import devices
from powerplan.load import catalogue_names, catalogue_spec, catalogue_text, load_model
from powerplan.version import __version__

SCRIPT = Path(sys.executable).with_name("powerplan")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must succeed without a remark, and return its standard output."""
    assert main(list(arguments)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(run(capsys, *arguments, "--format", "json"))
    return result


def test_an_explanation_says_a_number_once(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "wsfr", "gpt2-small", "--ctx", "64k", "--explain").splitlines()
    assert "    m = 768, times 12 layers = 9,216" in lines
    assert max(map(len, lines[lines.index("How the numbers at 65,536 tokens come about") :][:4])) <= 98


def test_wsfr_json_keeps_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, "wsfr", "gpt2-small", "--ctx", "1k,64k")
    assert result["schema"] == "powerplan.wsfr/1"
    assert result["model"]["name"] == "gpt2-small"
    assert result["model"]["params_total"] == result["model"]["params_active"] == 124_439_808
    assert {key: result["convention"][key] for key in ("causal", "lm_head", "form")} == {
        "causal": "exact",
        "lm_head": True,
        "form": "recurrent",
    }
    assert result["balanced_context"] == 13_403
    first, second = result["rows"]
    assert first == {
        "context": 1024,
        "weight_flops_per_token": 247_064_064,
        "state_flops_per_token": 18_892_800,
        "wsfr": 247_064_064 / 18_892_800,
        "state_elements": 12 * 2 * 768 * 1024,
        "state_bytes": 36_864 * 1024,
        "decode_weight_bytes_per_token": 2 * (124_439_808 - 1024 * 768),
        "decode_state_bytes_per_token": 36_864 * 1025,
        "verdict": "weight-heavy: 13.1x as many weight as state FLOPs at 1,024 tokens; balanced at 13,403",
    }
    assert second["state_flops_per_token"] == 1_207_977_984


@pytest.mark.parametrize("by", ["component", "layer"])
def test_parts_in_json_sum_to_the_row(capsys: pytest.CaptureFixture[str], by: str) -> None:
    result = run_json(capsys, "wsfr", "gemma-2-9b", "--ctx", "8k,64k", "--by", by)
    for row in result["rows"]:
        parts = row[f"by_{by}"]
        assert sum(part["weight_flops_per_token"] for part in parts) == row["weight_flops_per_token"]
        assert sum(part["state_flops_per_token"] for part in parts) == pytest.approx(row["state_flops_per_token"])
        assert sum(part["share"] for part in parts) == pytest.approx(1)


def test_wsfr_table_says_what_the_ratio_means(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "wsfr", "gpt2-small", "--ctx", "64k")
    assert "gpt2-small: 124.4M parameters" in out
    assert "1:4.89" in out
    expected = "state-heavy: 4.9x as many state as weight FLOPs at 65,536 tokens; balanced at 13,403"
    assert out.splitlines()[-1] == expected


@pytest.mark.parametrize(
    ("arguments", "verdict"),
    [
        (["--ctx", "1k"], "weight-heavy: 13.1x as many weight as state FLOPs at 1,024 tokens; balanced at 13,403"),
        (["--ctx", "13403"], "balanced: 1:1 weight to state FLOPs at 13,403 tokens"),
        (["--ctx", "64k", "--mixer", "power:p=2"], "its state stays lighter than its weights at any context"),
        (
            ["--ctx", "64k", "--mixer", "power:p=3,normalize=false"],
            "its state is heavier than its weights at any context",
        ),
        (
            ["--ctx", "64k", "--mixer", "power:p=2", "--form", "chunked"],
            "where it balances is not computed for --form chunked",
        ),
    ],
)
def test_verdicts(capsys: pytest.CaptureFixture[str], arguments: list[str], verdict: str) -> None:
    assert run(capsys, "wsfr", "gpt2-small", *arguments).splitlines()[-1].endswith(verdict)


def test_a_state_that_does_not_grow_steadily(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["wsfr", "gpt2-small", "--ctx", "64k", "--mixer", "log_linear"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("not computed: its state FLOPs per token do not always grow with the context")


def test_explain_prints_formula_numbers_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "wsfr", "gpt2-small", "--ctx", "64k", "--explain")
    assert "layers 0-11: attention + mlp" in out
    assert "source: Vaswani et al. 2017" in out
    assert "2·H·(k + v)·keys = 2·12·(64 + 64)·32,768.5 = 100,664,832, times 12 layers = 1,207,977,984" in out
    entries = run_json(capsys, "wsfr", "gpt2-small", "--ctx", "64k", "--explain")["explain"]
    (state,) = [entry for entry in entries if entry["quantity"] == "state FLOPs per token"]
    assert state["formula"] == "2*H*(k + v)*keys"
    assert state["values"] == {"H": 12, "k": 64, "v": 64, "keys": 32_768.5}
    assert state["value"] * state["layers"] == 1_207_977_984


def test_csv_holds_raw_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    rows = list(csv.DictReader(io.StringIO(run(capsys, "wsfr", "gpt2-small", "--ctx", "1k,64k", "--format", "csv"))))
    assert [row["context"] for row in rows] == ["1024", "65536"]
    assert rows[1]["state_flops_per_token"] == "1207977984"
    assert float(rows[1]["wsfr"]) == pytest.approx(0.204527, rel=1e-5)


def test_a_heading_of_two_lines_is_one_in_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    for command, headings in (("budget --flops 1e21", "layers x width"), ("reproduce training-time", "efficiency")):
        out = run(capsys, *command.split(), "--format", "markdown")
        assert f" {headings} |" in out
    assert "|   bytes per token |" in run(capsys, "decode", "gpt2-small", "--format", "markdown")


def test_markdown_is_a_pipe_table(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "dims", "--head-dim", "64", "--p", "2", "--format", "markdown")
    lines = text.rpartition("\n\n")[2].splitlines()
    assert lines[0].startswith("|")
    assert set(lines[1]) <= set("|-:")
    assert "2,080" in lines[2]


def test_options_of_the_convention_reach_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    full = run_json(capsys, "wsfr", "gpt2-small", "--ctx", "1k", "--causal", "full", "--exclude", "lm-head")
    assert full["convention"]["causal"] == "full"
    assert full["convention"]["lm_head"] is False
    assert full["rows"][0]["state_flops_per_token"] == 12 * 2 * 12 * 128 * 1024
    assert full["rows"][0]["weight_flops_per_token"] == 24 * 12 * 768**2
    fp8 = run_json(capsys, "wsfr", "gpt2-small", "--ctx", "1k", "--dtype", "fp8")
    assert fp8["rows"][0]["state_bytes"] == 18_432 * 1024
    chunked = run_json(capsys, "wsfr", "gpt2-small", "--ctx", "64k", "--mixer", "power:p=2", "--form", "chunked")
    assert chunked["convention"]["form"] == "chunked"
    assert chunked["rows"][0]["state_flops_per_token"] > 77_875_200


def test_dims_json_keeps_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, "dims", "--head-dim", "64,128", "--p", "2,3", "--tile", "16")
    assert result["schema"] == "powerplan.dims/1"
    assert [(row["head_dim"], row["p"]) for row in result["rows"]] == [(64, 2), (64, 3), (128, 2), (128, 3)]
    first = result["rows"][0]
    assert {key: first[key] for key in ("tile", "tpow", "spow", "tspow")} == {
        "tile": 16,
        "tpow": 4096,
        "spow": 2080,
        "tspow": 10 * 256,
    }
    assert first["savings"] == 1 - 2080 / 4096


def test_models_list_and_details(capsys: pytest.CaptureFixture[str]) -> None:
    listed = run_json(capsys, "models")["models"]
    assert [row["name"] for row in listed] == list(catalogue_names())
    details = run_json(capsys, "models", "deepseek-v3")
    assert details["params_by_convention"]["without_embeddings"] == {
        "total": 669_173_061_120,
        "active": 35_698_939_392,
    }
    out = run(capsys, "models", "deepseek-v3")
    assert "671,026,419,200" in out
    assert "layers 3-60" in out


def test_models_yaml_is_an_editable_spec(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = run(capsys, "models", "gpt2-small", "--yaml")
    assert text == catalogue_text("gpt2-small")
    edited = tmp_path / "mine.yaml"
    edited.write_text(text.replace("name: gpt2-small", "name: mine").replace("repeat: 12", "repeat: 24"))
    assert load_model(edited).spec.layer_count == 24


def test_a_what_if_can_be_saved(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saved = tmp_path / "mine.yaml"
    saved.write_text(run(capsys, "models", "llama-3-8b", "--mixer", "power:p=2,gated=true", "--yaml"))
    spec = load_model(saved).spec
    assert spec.aliases == ()
    assert Accounting(spec).state_flops_per_token(1) == 2_726_461_440
    assert Accounting(spec).weight_flops_per_token == 15_009_316_864 + 2 * 32 * 4096 * 8


def test_a_bare_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys)
    assert "Usage: powerplan" in out
    assert "hardware" in out


def test_hardware_gives_unit_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    (device,) = run_json(capsys, "hardware", "H100-SXM")["devices"]
    assert device["bf16_flops"] == 989 * 10**12
    assert device["memory_bytes_per_s"] == 3350 * 10**9
    out = run(capsys, "hardware", "h100-sxm")
    assert "FLOP/s" in out
    assert "vendor datasheet" in out
    assert (device["link"], device["node_devices"], device["network_bytes_per_s"]) == ("NVLink", 8, 50 * 10**9)
    assert (device["tdp_w"], device["link_source"]) == (700, devices()["h100-sxm"].link_source)
    assert "ConnectX-7" in out
    flagged = {row["name"] for row in run_json(capsys, "hardware")["devices"] if row["verify"]}
    assert "b200-sxm" in flagged
    assert "h100-sxm" not in flagged


def test_doctor_reports_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    findings = {finding["what"]: finding for finding in run_json(capsys, "doctor")["findings"]}
    assert findings["powerplan"]["found"] == __version__
    assert findings["planning commands"]["ok"] is True
    assert f"{len(os.sched_getaffinity(0))} cores" in findings["processor"]["found"]


def test_schema_accepts_the_catalogue_and_refuses_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(run(capsys, "schema"))
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    for name in catalogue_names():
        validator.validate(yaml.safe_load(catalogue_text(name)))
    spec = yaml.safe_load(catalogue_text("gpt2-small"))
    del spec["layers"][0]["mixer"]["head_dim"]
    spec["layers"][0]["mixer"]["window"] = "4k"
    validator.validate(spec)
    spec["layers"][0]["mixer"]["kv_head"] = 2
    with pytest.raises(jsonschema.ValidationError, match="kv_head"):
        validator.validate(spec)


def test_notes_go_to_stderr_and_data_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["wsfr", "deepseek-v3", "--ctx", "1k", "--mixer", "power:p=2", "--format", "json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["model"]["name"] == "deepseek-v3 with power:p=2"
    assert captured.err == (
        "note: MLA's low-rank projections become full ones of the same heads: the weights change too\n"
    )


def test_a_file_is_preferred_to_a_name_and_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2-small").write_text(catalogue_text("gpt2-large"))
    assert main(["wsfr", "gpt2-small", "--ctx", "1k"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("gpt2-large")
    assert captured.err == "note: read the file gpt2-small; there is also a built-in model of this name\n"
    (tmp_path / "gpt2-medium").mkdir()
    assert load_model("gpt2-medium").origin == "catalogue: gpt2-medium"


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == f"powerplan {__version__}\n"
    out = run(capsys, "wsfr", "--help")
    for option in ("--ctx", "--mixer", "--by", "--explain", "--form", "--causal", "--exclude", "--dtype", "--format"):
        assert option in out


def test_the_package_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "powerplan"]
    shown = subprocess.run([*command, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shown.stdout == f"powerplan {__version__}\n"
    refused = subprocess.run([*command, "nope"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "error: No such command 'nope' (powerplan --help)\n"


def test_learned_positions_are_a_limit_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert "learned positions end at 1,024: longer contexts are what-ifs" in run(capsys, "wsfr", "gpt2-small")
    assert "learned positions" not in run(capsys, "wsfr", "llama-3-8b")


def test_a_config_is_known_by_its_first_character_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sizes = {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50_257}
    path = tmp_path / "config.txt"
    path.write_text(json.dumps({"model_type": "gpt2", "quantization_config": {"bits": 4}} | sizes))
    assert main(["models", str(path), "--format", "json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["params_total"] == 124_439_808
    said = "quantization_config is not understood (it has no quant_method): bytes follow --dtype"
    assert captured.err == f"note: {said}\n"


def test_kernels_without_torch_say_what_is_missing() -> None:
    code = "import sys; sys.modules['torch'] = None\nimport importlib.util as u; u.find_spec = lambda name: None\n"
    code += "from powerplan.kernels import power_attention"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.stderr.splitlines()[-1] == (
        "ImportError: powerplan.kernels.power_attention needs torch, and it is not installed: pip install torch"
    )


@pytest.mark.parametrize("command", ["--help", "wsfr --help", "--version", "models --format json", "wsfr gpt2-small"])
def test_a_reader_that_has_gone_is_no_error(command: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([SCRIPT, *command.split()], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_pipe_is_no_error() -> None:
    process = subprocess.run(
        f"'{SCRIPT}' models --format json | head -c 10", shell=True, capture_output=True, text=True, check=False
    )
    assert process.stdout == '{\n  "schem'
    assert process.stderr == ""


def test_shell_completion_offers_models() -> None:
    environment = os.environ | {
        "_POWERPLAN_COMPLETE": "complete_bash",
        "COMP_WORDS": "powerplan wsfr llama-3",
        "COMP_CWORD": "2",
    }
    process = subprocess.run([SCRIPT], capture_output=True, text=True, env=environment, check=False)
    assert "llama-3-8b" in process.stdout.split()
    # typer looks for the shell among the parents of the process. `true` keeps bash from becoming the command itself.
    command = ["bash", "-c", f"{SCRIPT} --show-completion; true"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "_POWERPLAN_COMPLETE" in shown.stdout


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colour_is_for_terminals_that_want_it(no_color: str, coloured: bool) -> None:
    reader, writer = pty.openpty()
    environment = os.environ | {"NO_COLOR": no_color, "TERM": "xterm"}
    process = subprocess.run([SCRIPT, "wsfr", "nothing-like-it"], stderr=writer, env=environment, check=False)
    os.close(writer)
    text = os.read(reader, 10_000).decode()
    os.close(reader)
    assert process.returncode == 2
    assert ("\033[" in text) is coloured
    assert "is neither a file nor a built-in model" in text


def test_the_table_and_the_library_agree(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("llama-3-8b", "gpt-oss-20b", "kimi-k2"):
        (row,) = run_json(capsys, "wsfr", name, "--ctx", "128k")["rows"]
        assert row["weight_flops_per_token"] == Accounting(catalogue_spec(name)).weight_flops_per_token
