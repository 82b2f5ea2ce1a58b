"""What s3fs and gcsfs are told is told to obstore in its words, or it is said what cannot be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from expstate.storage.objects import obstore_options
from expstate.storage.objects.obstore import client
from expstate.storage.objects.obstore_options import CannotTranslateError, Connection, translate

KEYS = {"key": "key", "secret": "secret"}
HERE = {"endpoint_url": "http://127.0.0.1:9000"}
SIGNED = {"skip_signature": False}
CHECKED = {**SIGNED, "checksum_algorithm": "SHA256"}
UNCHECKED = {**SIGNED, "virtual_hosted_style_request": True, "region": "us-east-1"}
AWS = {**CHECKED, **UNCHECKED}
ELSEWHERE = {**CHECKED, "endpoint": "http://127.0.0.1:9000", "virtual_hosted_style_request": False, "region": "us-east-1"}
ACCOUNT = {"type": "service_account", "client_email": "a@b", "private_key": "the key", "private_key_id": "its id"}
USER = {"type": "authorized_user", "client_id": "id", "client_secret": "a secret", "refresh_token": "a token"}
NO_ACCOUNT = json.dumps({"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""})


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of whoever runs the tests; the region is set."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "STORAGE_", "CLOUDSDK_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(obstore_options, "_VENDOR", tmp_path / "vendor")


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


# S3: options, variables, and what becomes of them in the config and of the keys.
S3: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, Any], dict[str, str]]] = {
    "keys": ({**KEYS}, {}, AWS, {"access_key_id": "key", "secret_access_key": "secret"}),
    "other names": ({"username": "key", "password": "secret"}, {}, AWS, {"access_key_id": "key", "secret_access_key": "secret"}),
    "a token": ({**KEYS, "token": "t"}, {}, AWS, {"access_key_id": "key", "secret_access_key": "secret", "token": "t"}),
    "keys of botocore": (
        {"client_kwargs": {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "aws_session_token": "t"}},
        {},
        AWS,
        {"access_key_id": "key", "secret_access_key": "secret", "token": "t"},
    ),
    "keys of the environment": (
        {},
        {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_SESSION_TOKEN": "t"},
        AWS,
        {"access_key_id": "k", "secret_access_key": "s", "token": "t"},
    ),
    "one's own keys without another's token": (
        {**KEYS},
        {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_SESSION_TOKEN": "t"},
        AWS,
        {"access_key_id": "key", "secret_access_key": "secret"},
    ),
    "keys before a profile": (
        {**KEYS, "token": None, "profile": None},
        {"AWS_PROFILE": "somebody"},
        AWS,
        {"access_key_id": "key", "secret_access_key": "secret"},
    ),
    "no keys wanted": ({**KEYS, "anon": True}, {"AWS_PROFILE": "somebody"}, {**UNCHECKED, "skip_signature": True}, {}),
    "a container's": ({}, {"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/v2"}, AWS, {}),
    "a pod's": ({}, {"AWS_WEB_IDENTITY_TOKEN_FILE": "/token", "AWS_ROLE_ARN": "arn"}, AWS, {}),
    "an endpoint": ({**KEYS, **HERE}, {}, ELSEWHERE, {}),
    "an endpoint of botocore": ({**KEYS, "client_kwargs": {**HERE, "use_ssl": False}}, {}, ELSEWHERE, {}),
    "an endpoint of the environment": ({**KEYS}, {"AWS_ENDPOINT_URL": "http://127.0.0.1:9000"}, ELSEWHERE, {}),
    "an endpoint of the environment for S3": (
        {**KEYS},
        {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9000"},
        {**ELSEWHERE, "aws_endpoint_url_s3": "http://127.0.0.1:9000"},
        {},
    ),
    "one's own endpoint before that": (
        {**KEYS, **HERE, "client_kwargs": {"endpoint_url": "http://127.0.0.1:2"}},
        {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1"},
        {**ELSEWHERE, "aws_endpoint_url_s3": "http://127.0.0.1:9000"},
        {},
    ),
    "an endpoint with a path": (
        {**KEYS, "endpoint_url": "https://minio.example:9000/s3/"},
        {},
        {**ELSEWHERE, "endpoint": "https://minio.example:9000/s3"},
        {},
    ),
    "the bucket in the host": (
        {**KEYS, "endpoint_url": "https://objects.example", "config_kwargs": {"s3": {"addressing_style": "virtual"}}},
        {},
        {**ELSEWHERE, "endpoint": "https://bucket.objects.example", "virtual_hosted_style_request": True},
        {},
    ),
    "the bucket in the path": (
        {**KEYS, "config_kwargs": {"s3": {"addressing_style": "path"}, "signature_version": "s3v4"}},
        {},
        {**AWS, "virtual_hosted_style_request": False},
        {},
    ),
    "a region": ({**KEYS, "client_kwargs": {"region_name": "eu-north-1"}}, {}, {**AWS, "region": "eu-north-1"}, {}),
    "a region of the config": ({**KEYS, "config_kwargs": {"region_name": "eu-north-1"}}, {}, {**AWS, "region": "eu-north-1"}, {}),
    "a region of the environment": ({**KEYS}, {"AWS_DEFAULT_REGION": "", "AWS_REGION": "eu-north-1"}, {**AWS, "region": "eu-north-1"}, {}),
    "no region": ({**KEYS, **HERE}, {"AWS_DEFAULT_REGION": ""}, ELSEWHERE, {}),
    "who pays": ({**KEYS, "requester_pays": True}, {}, {**AWS, "request_payer": True}, {}),
    "encryption": (
        {**KEYS, "s3_additional_kwargs": {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "id", "BucketKeyEnabled": True}},
        {},
        {**AWS, "server_side_encryption": "aws:kms", "sse_kms_key_id": "id", "sse_bucket_key_enabled": True},
        {},
    ),
    "no checksums": ({**KEYS, "config_kwargs": {"request_checksum_calculation": "when_required"}}, {}, UNCHECKED, {}),
    "no checksums by the environment": ({**KEYS}, {"AWS_REQUEST_CHECKSUM_CALCULATION": "WHEN_REQUIRED"}, UNCHECKED, {}),
    "what changes nothing": (
        {
            **KEYS,
            **dict.fromkeys(("default_block_size", "max_concurrency"), 1),
            **dict.fromkeys(("default_cache_type", "session"), None),
            **dict.fromkeys(("cache_regions", "default_fill_cache", "fixed_upload_size", "skip_instance_cache", "use_ssl"), True),
            **dict.fromkeys(("anon", "asynchronous", "requester_pays", "use_listings_cache", "version_aware"), False),
            "config_kwargs": {"max_pool_connections": 50, "retries": {"max_attempts": 9}, "tcp_keepalive": True},
        },
        {"AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "false", "AWS_USE_FIPS_ENDPOINT": "false"},
        AWS,
        {},
    ),
}


@pytest.mark.parametrize(("options", "variables", "config", "keys"), S3.values(), ids=S3)
@pytest.mark.parametrize("scheme", ["s3", "s3a"])
def test_s3_is_told_what_s3fs_is_told(
    scheme: str,
    options: dict[str, Any],
    variables: dict[str, str],
    config: dict[str, Any],
    keys: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_all(monkeypatch, variables)
    connection = translate(scheme, "bucket", options)

    assert config == connection.config
    assert keys in ({}, connection.keys)
    assert tuple(connection.keys.values()) == connection.secrets
    assert config.get("endpoint", "").startswith("http:") == connection.client_options["allow_http"]
    assert f"{scheme}://bucket" == client(scheme, "bucket", options).url


S3_REFUSED: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "profile": ({**KEYS, "profile": "somebody"}, {}, "profile"),
    "a session": ({**KEYS, "session": object()}, {}, "session"),
    "of later versions": ({**KEYS, "something": 1}, {}, "something"),
    "no keys": ({}, {}, "key"),
    "half the keys": ({"key": "key"}, {}, "secret"),
    "the other half": ({"secret": "secret"}, {}, "key"),
    "a token alone": ({"token": "token"}, {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}, "token"),
    "half the keys of the environment": ({}, {"AWS_ACCESS_KEY_ID": "k"}, "secret"),
    "a key that is no word": ({"key": "key\n", "secret": "secret"}, {}, "key"),
    "a profile of the environment": ({}, {"AWS_PROFILE": "somebody"}, "AWS_PROFILE"),
    "an option of the client": ({**KEYS, "client_kwargs": {"verify": False}}, {}, "client_kwargs.verify"),
    "an option of the config": ({**KEYS, "config_kwargs": {"proxies": {}}}, {}, "config_kwargs.proxies"),
    "another signature": ({**KEYS, "config_kwargs": {"signature_version": "s3"}}, {}, "config_kwargs.signature_version"),
    "accelerated": ({**KEYS, "config_kwargs": {"s3": {"use_accelerate_endpoint": True}}}, {}, "config_kwargs.s3.use_accelerate_endpoint"),
    "no time": ({**KEYS, "config_kwargs": {"read_timeout": 0}}, {}, "config_kwargs.read_timeout"),
    "a word for a time": ({**KEYS, "config_kwargs": {"connect_timeout": "soon"}}, {}, "config_kwargs.connect_timeout"),
    "another encryption": ({**KEYS, "s3_additional_kwargs": {"SSECustomerKey": "key"}}, {}, "s3_additional_kwargs.SSECustomerKey"),
    "an access list": ({**KEYS, "s3_additional_kwargs": {"ACL": "public-read"}}, {}, "s3_additional_kwargs.ACL"),
    "AWS without TLS": ({**KEYS, "use_ssl": False}, {}, "use_ssl"),
    "a region to be found": ({**KEYS}, {"AWS_DEFAULT_REGION": ""}, "client_kwargs.region_name"),
    "a region of its own domain": ({**KEYS, "client_kwargs": {"region_name": "cn-north-1"}}, {}, "client_kwargs.region_name"),
    "a region that is no word": ({**KEYS, **HERE, "client_kwargs": {"region_name": "us east"}}, {}, "client_kwargs.region_name"),
    "a password in the endpoint": ({**KEYS, "endpoint_url": "http://a:b@127.0.0.1"}, {}, "endpoint_url"),
    "an endpoint without a scheme": ({**KEYS, "endpoint_url": "127.0.0.1:9000"}, {}, "endpoint_url"),
    "an endpoint with no port": ({**KEYS, "endpoint_url": "http://127.0.0.1:99999"}, {}, "endpoint_url"),
    "endpoints that are ignored": ({**KEYS}, {"AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}, "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"),
    "other endpoints": ({**KEYS}, {"AWS_USE_FIPS_ENDPOINT": "true"}, "AWS_USE_FIPS_ENDPOINT"),
    "certificates that are not there": ({**KEYS}, {"AWS_CA_BUNDLE": "/nowhere"}, "AWS_CA_BUNDLE"),
    "certificates that are none": ({**KEYS}, {"AWS_CA_BUNDLE": "/dev/null"}, "AWS_CA_BUNDLE"),
}


@pytest.mark.parametrize(("options", "variables", "refused"), S3_REFUSED.values(), ids=S3_REFUSED)
def test_s3_is_not_told_what_it_would_not_understand(
    options: dict[str, Any], variables: dict[str, str], refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_all(monkeypatch, variables)
    with pytest.raises(CannotTranslateError) as caught:
        client("s3", "bucket", options)

    assert refused == caught.value.option
    assert f"obstore cannot honour '{refused}'" == str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize("bucket", ["", "a b", "arn:aws:s3:us-east-1:1:accesspoint/a", "zone--use1-az1--x-s3", "key:secret@bucket"])
def test_some_buckets_are_for_others(bucket: str) -> None:
    for scheme in ("s3", "gs"):
        with pytest.raises(CannotTranslateError, match="bucket"):
            translate(scheme, bucket, {"anon": True} if scheme == "s3" else {"token": "anon"})


def test_other_schemes_are_for_others() -> None:
    with pytest.raises(CannotTranslateError, match="scheme"):
        translate("az", "bucket", {})


@pytest.mark.parametrize("bucket", ["a.b", "a_b"])
def test_a_bucket_whose_name_is_no_part_of_a_host_is_in_the_path(bucket: str) -> None:
    assert translate("s3", bucket, KEYS).config["virtual_hosted_style_request"] is False


def test_a_profile_may_tell_the_region(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/config").write_text("[default]\nregion=eu-north-1\noutput=json\ncli_pager=\n[profile b]\nregion=eu-west-1\n")

    assert "eu-north-1" == translate("s3", "bucket", KEYS).config["region"]
    monkeypatch.setenv("AWS_PROFILE", "b")
    assert "eu-west-1" == translate("s3", "bucket", KEYS).config["region"]


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("[default]\nrole_arn=arn\n", "AWS_CONFIG_FILE.role_arn"),
        ("[default]\ns3=\n  addressing_style=path\n", "AWS_CONFIG_FILE.s3"),
        ("no section, a secret\n", "AWS_CONFIG_FILE"),
    ],
)
def test_what_else_a_profile_tells_is_for_s3fs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, refused: str) -> None:
    file = tmp_path / "config"
    file.write_text(text)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(file))
    with pytest.raises(CannotTranslateError) as caught:
        translate("s3", "bucket", KEYS)

    assert refused == caught.value.option
    assert caught.value.__context__ is None


def test_keys_in_a_file_are_for_s3fs(tmp_path: Path) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text("[default]\naws_access_key_id=a\naws_secret_access_key=b\n")
    with pytest.raises(CannotTranslateError, match="AWS_SHARED_CREDENTIALS_FILE"):
        translate("s3", "bucket", {})

    assert {"access_key_id": "key", "secret_access_key": "secret"} == translate("s3", "bucket", KEYS).keys


def test_a_machine_of_aws_has_credentials_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vendor").write_text("Amazon EC2\n")

    assert {} == translate("s3", "bucket", {}).keys
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(CannotTranslateError, match="AWS_EC2_METADATA_DISABLED"):
        translate("s3", "bucket", {})


def test_certificates_are_those_of_aws_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bundle.pem").write_bytes(b"certificates")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "bundle.pem"))

    assert b"certificates" == translate("s3", "bucket", KEYS).client_options["root_certificate"]
    assert "root_certificate" not in translate("s3", "bucket", KEYS | HERE).client_options


def test_times_are_those_of_botocore() -> None:
    connection = translate("s3", "bucket", {**KEYS, "config_kwargs": {"connect_timeout": 1.5, "read_timeout": 7}})

    assert "1500ms" == connection.client_options["connect_timeout"]
    assert 7 == connection.read_seconds


# GCS


GS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nobody": ({"token": "anon"}, {"skip_signature": True, "service_account_key": NO_ACCOUNT}),
    "an account": ({"token": ACCOUNT}, {**SIGNED, "service_account_key": json.dumps(ACCOUNT)}),
    "the account of a file": ({"token": "account.json"}, {**SIGNED, "service_account": "account.json"}),
    "the user of a file": ({"token": "user.json"}, {**SIGNED, "application_credentials": "user.json"}),
    "a server of Google's": (
        {"token": "user.json", "endpoint_url": "https://storage-psc.p.googleapis.com/"},
        {**SIGNED, "base_url": "https://storage-psc.p.googleapis.com", "application_credentials": "user.json"},
    ),
    "what changes nothing": (
        {
            "token": "user.json",
            "access": "full_control",
            "block_size": 1,
            "cache_timeout": 0,
            "consistency": "none",
            "default_location": "EU",
            "project": "project",
            "requester_pays": False,
            "session_kwargs": {},
            "use_listings_cache": False,
        },
        {**SIGNED, "application_credentials": "user.json"},
    ),
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "account.json").write_text(json.dumps(ACCOUNT))
    (tmp_path / "user.json").write_text(json.dumps(USER))
    (tmp_path / "federated.json").write_text(json.dumps({"type": "external_account"}))
    (tmp_path / "broken.json").write_text('{"private_key": "a secret"')
    (tmp_path / "list.json").write_text("[]")
    return tmp_path


@pytest.mark.parametrize(("options", "config"), GS.values(), ids=GS)
@pytest.mark.parametrize("scheme", ["gs", "gcs"])
def test_gcs_is_told_what_gcsfs_is_told(scheme: str, options: dict[str, Any], config: dict[str, Any], files: Path) -> None:
    connection = translate(scheme, "bucket", options)

    assert ("gs", config) == (connection.protocol, connection.config)
    assert not connection.client_options["allow_http"]


def test_the_secrets_of_an_account_are_known(files: Path) -> None:
    assert ("the key", "its id") == translate("gs", "bucket", {"token": ACCOUNT}).secrets
    assert ("the key", "its id") == translate("gs", "bucket", {"token": "account.json"}).secrets
    assert ("a secret", "a token") == translate("gs", "bucket", {"token": "user.json"}).secrets


GS_REFUSED: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "no credentials": ({}, {}, "token"),
    "a token": ({"token": "ya29." + 300 * "secret"}, {}, "token"),
    "a browser": ({"token": "browser"}, {}, "token"),
    "the cloud's": ({"token": "cloud"}, {}, "token"),
    "an object": ({"token": object()}, {}, "token"),
    "a user": ({"token": USER}, {}, "token"),
    "a federated identity": ({"token": "federated.json"}, {}, "token"),
    "a broken file": ({"token": "broken.json"}, {}, "token"),
    "another file": ({"token": "list.json"}, {}, "token"),
    "a file of the environment that is not there": ({}, {"GOOGLE_APPLICATION_CREDENTIALS": "none.json"}, "token"),
    "another universe": ({"token": {**ACCOUNT, "universe_domain": "example.com"}}, {}, "token"),
    "another server": ({"token": "anon", "endpoint_url": "http://127.0.0.1:4443"}, {}, "endpoint_url"),
    "no server": ({"token": "anon", "endpoint_url": "http://127.0.0.1:4443?a"}, {}, "endpoint_url"),
    "an emulator": ({"token": "anon"}, {"STORAGE_EMULATOR_HOST": "127.0.0.1:4443"}, "STORAGE_EMULATOR_HOST"),
    "who may only read": ({"token": "anon", "access": "read_only"}, {}, "access"),
    "who pays": ({"token": "anon", "requester_pays": True}, {}, "requester_pays"),
    "checks": ({"token": "anon", "consistency": "md5"}, {}, "consistency"),
    "a session": ({"token": "anon", "session_kwargs": {"trust_env": True}}, {}, "session_kwargs"),
    "a time": ({"token": "anon", "requests_timeout": 3}, {}, "requests_timeout"),
    "what obstore alone would read": ({"token": "anon"}, {"GOOGLE_SERVICE_ACCOUNT": "other.json"}, "GOOGLE_SERVICE_ACCOUNT"),
}


@pytest.mark.parametrize(("options", "variables", "refused"), GS_REFUSED.values(), ids=GS_REFUSED)
def test_gcs_is_not_told_what_it_would_not_understand(
    options: dict[str, Any], variables: dict[str, str], refused: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_all(monkeypatch, variables)
    with pytest.raises(CannotTranslateError) as caught:
        translate("gs", "bucket", options)

    assert refused == caught.value.option
    assert caught.value.__context__ is None


def test_the_credentials_of_the_environment_are_googles(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = files / ".config/gcloud"
    folder.mkdir(parents=True)
    (folder / "application_default_credentials.json").write_text(json.dumps(USER))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "default")
    expected = {**SIGNED, "application_credentials": str(folder / "application_default_credentials.json")}

    assert expected == translate("gs", "bucket", {}).config
    assert expected == translate("gs", "bucket", {"token": "google_default"}).config
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "account.json")
    assert {**SIGNED, "service_account": "account.json"} == translate("gs", "bucket", {}).config
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(files))
    with pytest.raises(CannotTranslateError):
        translate("gs", "bucket", {})


def test_a_machine_of_google_has_credentials_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "vendor").write_text("Google\n")

    assert SIGNED == translate("gs", "bucket", {}).config


# What is kept


def test_connections_are_told_apart_by_bucket_server_and_credentials() -> None:
    def identity(bucket: str = "bucket", **options: Any) -> str:
        return translate("s3", bucket, {**KEYS, **options}).identity

    assert identity() == identity(max_concurrency=3, config_kwargs={"read_timeout": 3})
    others = [identity("another"), identity(secret="another"), identity(token="token"), identity(anon=True), identity(**HERE)]  # noqa: S106
    assert 1 + len(others) == len({identity(), *others})


def test_a_connection_does_not_show_its_secrets() -> None:
    connection = translate("gs", "bucket", {"token": ACCOUNT})

    assert isinstance(connection, Connection)
    assert "the key" not in repr(connection) + repr(connection.identity)
