"""Secrets are recognised in what is gathered and typed, and what is none stays as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expstate import Snapshot, StateDict
from expstate.catalog.provenance import redact
from expstate.errors import InvalidMetadataError, ProvenanceWarning

# What people pass to trainings every day.
INNOCENT_ARGV = [
    *("train.py", "--tokenizer", "bert-base-uncased", "--max-tokens", "100", "--key-dim", "64", "--num-keys", "3", "num_keys=3"),
    *("--token-embedding", "learned", "--pad-token", "<pad>", "--eos-token-id", "2", "--special-tokens", "[SEP]", "--sort-key", "length"),
    *("--lr", "3e-4", "--config", "configs/base.yaml", "--model", "facebook/opt-125m", "--output_dir=/data/runs/resnet50-v2-2026-01-01"),
    *("optimizer.betas=[0.9,0.999]", "+trainer.max_epochs=90", "--dtype=bfloat16", "--seed", "1234567890123456", "--token-dropout", "0.1"),
    *("--checkpoint", "3f9a2c71", "--commit", "9cc852cda42411546cb75036c47b7552d851ad17", "--password-file", "/run/secrets/db"),
    *("--api-key-env", "WANDB_API_KEY", "--use-token", "true", "--data", "s3://bucket/imagenet/train", "--keys", "image", "label"),
    *("--tokens-per-batch=4096", "--n-key-value-heads", "8", "-v", "--no-secrets", "--image-key", "jpg"),
    *("key=value", "key1=value1", "dataset_key=imagenet-1k-v2", "PWD=/home/me/runs", "--dummykey", "loss", "--password", "$PASSWORD"),
]
INNOCENT_PARAMS: dict[str, Any] = {
    "lr": 3e-4,
    "tokenizer": "EleutherAI/gpt-neox-20b",
    "tokenizer_name": "google/t5-v1_1-base",
    "max_tokens": 2048,
    "num_tokens": "300B",
    "pad_token": "<|endoftext|>",
    "bos_token": "<s>",
    "mask_token": "[MASK]",
    "token_pooling": "mean",
    "key_dim": 64,
    "key_padding": "left",
    "keys": ["image", "label"],
    "key": "val_accuracy_top_5",
    "image_key": "jpg",
    "monitor_key": "val/loss_epoch_average_2",
    "sort_key": "length",
    "rng_key": "threefry2x32-0123456789",
    "primary_key": "sample_id",
    "qkv": "split",
    "pass": "forward",
    "num_passes": 2,
    "passthrough": "yes",
    "compass": "north",
    "secretary_problem": "optimal stopping",
    "password_policy": "none",
    "author": "A. N. Author",
    "authentic": True,
    "betas": (0.9, 0.999),
    "dtype": "torch.bfloat16",
    "git": "9cc852cda42411546cb75036c47b7552d851ad17",
    "sha256": "b5d4045c3f466fa91fe2cc6abe79232a1a57cdf104f7a26e716e0a1e2789df78",
    "dataset": "s3://bucket/imagenet-21k/train-00001-of-01024.tar",
    "run": "resnet50-bs4096-lr3e-4-wd0.05-2026-01-01",
    "model": {"name": "opt-125m", "layers": [{"key": "q_proj"}, {"key": "k_proj"}], "token_type": "byte"},
    "schedule": "warmup=1000; decay=cosine; min_lr=1e-5",
    "prompt": "The password is a riddle: what has keys but cannot open locks?",
    "system": "You are a basic understanding assistant; the bearer of good news.",
    "formula": "loss = ce + 0.1 * kl",
    "eval_every": "10k",
    "uuid": "123e4567-e89b-12d3-a456-426614174000",
    "host": "node-17.cluster.example.org:8476",
    "email": "a.author@example.org",
    "skip": "sk-learn-random-forest-classifier",
    "hf_model": "hf-internal-testing/tiny-random-bert",
}
INNOCENT_TEXTS = [
    "tokenizer = AutoTokenizer.from_pretrained('bert-base-uncased', use_auth_token=True)",
    "token = tokenizer.encode(text)\nkey = jax.random.PRNGKey(0)\nkey, subkey = jax.random.split(key)",
    "q, k, v = self.key(x), self.query(x), self.value(x)\nassert keys == ['loss', 'accuracy']",
    "wandb.login(key=os.environ['WANDB_API_KEY'])",
    "password = getpass.getpass()\nclient = Client(password=password, token=token2)",
    "API_KEY = os.environ['API_KEY']",
    'login(token=f"{prefix}{token}")',
    "def connect(host: str, password: str = None, token: Optional[str] = None): ...",
    "lr too high, try 3e-4; the key is warmup. See step 1000: loss 0.3",
    "forward pass = 12 ms, backward pass: 24 ms",
    'config = {"pad_token": "[PAD]", "key": "loss", "secret": None}',
    "best run so far: 9cc852cda42411546cb75036c47b7552d851ad17 at http://localhost:6006/scalars",
    "use --token-file /run/secrets/hub1 and --key val/loss_1; --password takes what follows",
    "export PATH=/opt/bin:$PATH\n%env OMP_NUM_THREADS=4\nexport HF_TOKEN=$(cat ~/.token1)",
    "curl -u $USER:$PASSWORD https://host/page\ndocker login -p $PASSWORD\nmysql -u me -p",
    "def attend(token: Int64, key: Key2): ...",
    'hotkey, monkey, bypass = "ctrl-k1", "george", "north-2"',
    "<img src='data:image/png;base64," + "iVBORw0KGgoAAAANSUhEUgAAAAUA9k/rrgggA" * 40 + "'>",
]


def letters(count: int) -> str:
    """Letters and digits as keys have them; put together here, so that no text of this file looks like a key to others' tools."""
    return ("Zk3v9QpL0aXw82TbR7yUc5NdE1mF" * 4)[:count]


PASSWORDS = [
    *("AKIA" + "Z3V9QPL0AXW82TBR", "ghp_" + letters(36), "gho_" + letters(36), "github_pat_" + letters(22) + "_" + letters(59)),
    *("glpat-" + letters(20), "hf_" + letters(34), "sk-" + letters(48), "sk-proj-" + letters(60), "sk-ant-api03-" + letters(40)),
    *("xoxb-" + "123456789012-" + letters(24), "AIza" + letters(35), "ya29." + letters(60), "npm_" + letters(36)),
    *(f"eyJ{letters(20)}.eyJ{letters(40)}.{letters(43)}", "-----BEGIN OPENSSH " + "PRIVATE KEY-----\nb3BlbnNzaC1rZXk"),
    *("sk_live_" + letters(24), "dapi" + "0123456789abcdef" * 2, "https://hooks.slack.com/services/T0/B0/" + letters(24)),
    *("gsk_" + letters(52), "nvapi-" + letters(64), "wandb_v1_" + letters(60), "dckr_pat_" + letters(27), "hvs." + letters(90)),
    *("123456789:AA" + letters(33), "https://discord.com/api/webhooks/1234567/" + letters(60)),
]
IN_CONTEXT = [
    "postgresql://team:hunter2@db.example.org/runs",
    "s3://KEY:SEC/RET@bucket/run",
    'password = "hunter2"',
    "db_password: 'correct horse'",
    'login(token="abcdefghij")',
    'os.environ["WANDB_API_KEY"] = "' + "0123456789abcdef" * 2 + '01234567"',
    "wandb login " + "0123456789abcdef" * 2 + "01234567",
    "export AWS_SECRET_ACCESS_KEY=wJalr/" + letters(34),
    '{"api_key": "abcd-efgh"}',
    "Authorization: Bearer " + letters(20),
    'headers = {"Authorization": "Basic dXNlcjpwYXNz"}',
    "host=db user=me password=hunter dbname=runs",
    'secret: str = "abcdef"',
    "the password: hunter2",
    "client_secret='it-is-\"quoted\"'",
    "PGPASSWORD=hunter2 psql",
    "hftoken = 'abcdef'",
    "Data Source=db;User Id=me;Pwd=hunter22;",
    "curl -H 'X-API-Key: abcdefgh1234' https://host",
    "!huggingface-cli login --token abcdef1234",
    "%env HF_TOKEN abcdefghij",
    "export DB_PASSWORD='correcthorse'",
    "os.environ.setdefault('HF_TOKEN', 'abcdefghij')",
    "requests.get(url, auth=('me', 'hunter2'))",
    "curl -k -u me:hunter2 https://host",
    "sshpass -p hunter2 ssh host",
    "docker login -u me -p hunter2",
    "mysqldump -u me -phunter2 runs",
    "sas = '?sv=2024-01-01&ss=b&sig=abcdefgh%3D'",
]


@pytest.mark.parametrize("secret", PASSWORDS + IN_CONTEXT)
def test_a_text_with_a_secret_in_it_becomes_a_hash(secret: str) -> None:
    text = f"first line\n{secret}\nlast line"

    assert redact.hashed(text) == redact.text(text)
    assert re.fullmatch(r"\[secret [0-9a-f]{8}\]", redact.text(text))


@pytest.mark.parametrize("text", INNOCENT_TEXTS)
def test_code_and_notes_that_speak_of_keys_stay_as_they_are(text: str) -> None:
    assert text == redact.text(text)


def test_a_template_of_a_url_is_no_secret() -> None:
    """It loses what URLs lose, and the rest stays."""
    assert 'url = f"postgresql://{host}/runs"' == redact.text('url = f"postgresql://{user}:{password}@{host}/runs"')


def test_innocent_command_lines_stay_as_they_are() -> None:
    assert INNOCENT_ARGV == redact.argv(INNOCENT_ARGV)


def test_innocent_params_stay_the_very_same() -> None:
    found, replaced = redact.params(INNOCENT_PARAMS)

    assert [] == replaced
    assert found is INNOCENT_PARAMS
    assert len(INNOCENT_PARAMS) + len(INNOCENT_ARGV) > 60


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["--token", "x-y-z"], ["--token", "#"]),
        (["--token=x-y-z"], ["--token=#"]),
        (["-api_key", "x-y-z", "--lr", "1"], ["-api_key", "#", "--lr", "1"]),
        (["wandb.key=x-y-z"], ["wandb.key=#"]),
        (["+logger.password=x-y-z"], ["+logger.password=#"]),
        (["--key", "x-y-z"], ["--key", "#"]),
        (["--password", "123456"], ["--password", "#"]),
        (["--secret=abc"], ["--secret=#"]),
        (["PGPASSWORD=x-y-z"], ["PGPASSWORD=#"]),
        (["-DPASSWORD=x-y-z"], ["-DPASSWORD=#"]),
        (["--client-secret", "x-y-z"], ["--client-secret", "#"]),
        (["--token", "--verbose", "x-y-z"], ["--token", "--verbose", "x-y-z"]),
        (["--data", "https://me:x-y-z@host/data"], ["--data", "##"]),
        (["--data", "https://host/data?sig=x-y-z#top"], ["--data", "https://host/data"]),
        (["--header", "Authorization: Bearer x-y-z-12345"], ["--header", "##"]),
    ],
)
def test_values_of_flags_that_are_named_like_a_secret_are_replaced(given: list[str], shown: list[str]) -> None:
    value = next((value for value in ("123456", "abc") if given[-1].endswith(value)), "x-y-z")
    wanted = [item.replace("##", redact.hashed(given[-1])).replace("#", redact.hashed(value)) for item in shown]

    assert wanted == redact.argv(given)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"api_key": "abcd"}, ["api_key"]),
        ({"pgpassword": "abcd"}, ["pgpassword"]),
        ({"password": "123456"}, ["password"]),
        ({"secret": {"pin": "1234"}}, ["secret.pin"]),
        ({"hub": {"token": "abcd"}}, ["hub.token"]),
        ({"keys": [{"password": b"abcd"}]}, ["keys.password"]),
        ({"credentials": {"user": "me-myself", "more": ["abcd"]}}, ["credentials.user", "credentials.more"]),
        ({"remote": ("postgresql://me:abcd@host/db", 3)}, ["remote"]),
        ({"data": "https://host/x?X-Signature=abcd"}, ["data"]),
        ({"anything": "hf_" + letters(34)}, ["anything"]),
        ({"license_key": letters(20)}, ["license_key"]),
        ({"model_key": letters(20)}, ["model_key"]),
    ],
)
def test_params_are_replaced_by_their_name_or_by_their_value(given: dict[str, Any], names: list[str]) -> None:
    found, replaced = redact.params(given)

    assert names == replaced
    assert "abcd" not in repr(found)
    assert "1234" not in repr(found)
    assert letters(20) not in repr(found)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("https://token@host/path", "https://host/path"),
        ("https://user:pa@ss@host:8080/path?x=1#y", "https://host:8080/path"),
        ("https://user:pa/ss@host/path", "https://host/path"),
        ("https://user:pa?ss#@host/path", "https://host/path"),
        ("https://[::1]:80/path?x", "https://[::1]:80/path"),
        ("http://host:80/@me/page", "http://host:80/@me/page"),
        ("s3://bucket/run?versionId=1", "s3://bucket/run"),
        ("/no/url?", "/no/url?"),
    ],
)
def test_urls_lose_user_info_query_and_fragment(given: str, shown: str) -> None:
    assert shown == redact.url(given)


@given(st.text(max_size=200))
def test_what_may_be_recorded_is_not_changed_again(text: str) -> None:
    once = redact.text(text)

    assert once == redact.text(once)


@given(st.from_regex(r"[A-Za-z0-9!*~._-]{1,20}", fullmatch=True), st.from_regex(r"[A-Za-z0-9/?#!~._-]{8,20}", fullmatch=True))
def test_no_password_of_a_url_gets_through(user: str, password: str) -> None:
    assert f"{password}@" not in redact.text(f"see https://{user}:x{password}@host.example/path for it")


@pytest.mark.parametrize("part", ["password", "token=", "://", "eyJ-", "key: a ", "a" * 80 + "_key", 'key = "', "bearer ", "user=x "])
def test_long_texts_are_looked_through_in_one_go(part: str) -> None:
    """What would take the square of its length to match would not end here."""
    text = part * (2**18 // len(part))

    assert len(redact.text(text)) > 0


def test_a_take_records_hashes_of_note_and_params_and_says_so(tmp_path: Path) -> None:
    note, token = 'I used api_key="abcd-efgh" here', "abcd-efgh-ijkl"
    with pytest.warns(ProvenanceWarning, match="the note, param 'hub.token': looks like a secret") as warned:
        taken = Snapshot.take(tmp_path / "run", {"a": StateDict(x=1)}, note=note, params={"hub": {"token": token}, "lr": 0.1})

    assert redact.hashed(note) == taken.metadata.note
    assert {"hub": {"token": redact.hashed(token)}, "lr": 0.1} == taken.metadata.params
    assert 1 == len(warned)
    assert [__file__] == [warning.filename for warning in warned]
    assert b"abcd-efgh" not in (tmp_path / "run" / "snapshot.json").read_bytes()


def test_what_a_person_types_stays(tmp_path: Path) -> None:
    """Names, tags and names of metrics are refs and columns: they are the person's own."""
    label = "hf_" + letters(34)
    taken = Snapshot.take(tmp_path / "run", {"a": StateDict(x=1)}, name=label, tags=[label], metrics={label: 1})

    assert (label, (label,), {label: 1}) == (taken.metadata.name, taken.metadata.tags, taken.metadata.metrics)


@pytest.mark.parametrize("params", [{"a": object()}, {1: 2}, [1]])
def test_params_that_cannot_be_recorded_are_refused_as_before(tmp_path: Path, params: Any) -> None:
    with pytest.raises(InvalidMetadataError):
        Snapshot.take(tmp_path / "run", {"a": StateDict(x=1)}, params=params)


def test_params_of_any_kind_of_mapping_are_looked_through(tmp_path: Path) -> None:
    class Items:
        def items(self) -> list[tuple[str, Any]]:
            return [("api_key", "abcd-efgh"), ("lr", 0.1)]

    with pytest.warns(ProvenanceWarning, match="api_key"):
        taken = Snapshot.take(tmp_path / "run", {"a": StateDict(x=1)}, params=Items())  # type: ignore[arg-type]

    assert {"api_key": redact.hashed("abcd-efgh"), "lr": 0.1} == taken.metadata.params


def test_params_that_hold_themselves_are_refused(tmp_path: Path) -> None:
    params: dict[str, Any] = {"a": {}}
    params["a"]["a"] = params["a"]
    with pytest.raises(InvalidMetadataError, match="nested too deeply"):
        Snapshot.take(tmp_path / "run", {"a": StateDict(x=1)}, params=params)

    assert not (tmp_path / "run").exists()
