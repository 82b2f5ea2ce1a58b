"""What s3fs and gcsfs are told, as ``obstore`` is told it: options of storage, and the settings of the environment that those two read.

``translate`` gets a bucket and fsspec's ``storage_options``; it hands on a ``Connection``, of which ``obstore`` makes its stores. What
would mean something else there, or nothing, is a ``CannotTranslateError``: then s3fs or gcsfs serves. Nothing is asked of the network.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

CONNECT_SECONDS: Final = 5.0
READ_SECONDS: Final = 30.0

_FSSPEC_IGNORED: Final = frozenset(
    {"asynchronous", "listings_expiry_time", "loop", "max_paths", "skip_instance_cache", "use_listings_cache"}
)
# How s3fs cuts and caches what it moves, and how botocore tries again and checks: obstore does none of it, or by itself.
_S3_IGNORED: Final = _FSSPEC_IGNORED | {
    *("cache_regions", "default_block_size", "default_cache_type", "default_fill_cache", "fixed_upload_size", "local_expiry_check"),
    *("max_concurrency", "version_aware"),
}
_BOTOCORE_IGNORED: Final = frozenset(
    {"max_pool_connections", "response_checksum_validation", "retries", "tcp_keepalive", "user_agent_extra"}
)
_BOTOCORE_S3_IGNORED: Final = frozenset({"payload_signing_enabled", "us_east_1_regional_endpoint"})
_GS_IGNORED: Final = _FSSPEC_IGNORED | {
    *("block_size", "cache_timeout", "check_connection", "default_location", "project", "secure_serialize", "version_aware"),
}
_ENCRYPTION: Final = {
    "BucketKeyEnabled": "sse_bucket_key_enabled",
    "SSEKMSKeyId": "sse_kms_key_id",
    "ServerSideEncryption": "server_side_encryption",
}
# Variables that change what one of the two clients does, and not the other.
_S3_VARIABLES: Final = ("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "AWS_USE_DUALSTACK_ENDPOINT", "AWS_USE_FIPS_ENDPOINT")
_GS_VARIABLES: Final = (
    *("GOOGLE_API_USE_CLIENT_CERTIFICATE", "GOOGLE_BASE_URL", "GOOGLE_BEARER_TOKEN", "GOOGLE_CLOUD_UNIVERSE_DOMAIN"),
    *("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_SERVICE_ACCOUNT_PATH", "GOOGLE_SKIP_SIGNATURE"),
)
_CONTAINER: Final = ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_WEB_IDENTITY_TOKEN_FILE")
_KEY_NAMES: Final = ("access_key_id", "secret_access_key", "session_token")
_SECRET_NAMES: Final = frozenset({"client_secret", "private_key", "private_key_id", "refresh_token"})
# Not arn:...: neither access points nor other servers' buckets; nor directory buckets, whose servers are in one zone.
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?<!--x-s3)")
_URL: Final = re.compile(r"https?://(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?(?:/[A-Za-z0-9._~/-]*)?")
_LAST_PORT: Final = 65_535
_WORD: Final = re.compile(r"[!-~]+")
# Of the partitions of AWS that are worlds of their own, with domains of their own.
_OTHER_DOMAINS: Final = ("cn-", "us-iso", "eu-iso", "eusc-")
_NO_SIGNATURE: Final = {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
_VENDOR: Final = Path("/sys/class/dmi/id/sys_vendor")


class CannotTranslateError(Exception):
    """A storage option, or a setting of the environment, cannot be honoured by ``obstore``: use s3fs or gcsfs.

    Attributes
    ----------
    option : str
        Its name.
    """

    def __init__(self, option: str) -> None:
        super().__init__(f"obstore cannot honour {option!r}")
        self.option = option


@dataclass(frozen=True, slots=True)
class Connection:
    """How a bucket is reached.

    Attributes
    ----------
    protocol : str
        ``s3`` or ``gs``.
    bucket : str
        Its name.
    config : dict of str to object
        The ``config`` of ``S3Store`` or ``GCSStore``.
    client_options : dict of str to object
        Their ``client_options``.
    keys : dict of str to str
        What S3 is asked with, named as in ``S3Credential``; empty where the store finds it by itself, or asks without.
    secrets : tuple of str
        What no message may hold.
    read_seconds : float
        How long is waited for the next bytes of a reply.
    """

    protocol: str
    bucket: str
    config: dict[str, Any] = field(repr=False)
    client_options: dict[str, Any] = field(repr=False)
    keys: dict[str, str] = field(default_factory=dict, repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)
    read_seconds: float = READ_SECONDS

    @property
    def identity(self) -> str:
        """The same for connections to one bucket of one server with the same credentials, which cannot be told from it."""
        whole = json.dumps([self.protocol, self.bucket, self.config, self.keys], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()


def translate(scheme: str, bucket: str, storage_options: Mapping[str, Any]) -> Connection:
    """How ``obstore`` reaches a bucket as s3fs or gcsfs would with these options, here and now.

    Parameters
    ----------
    scheme : str
        ``s3``, ``s3a``, ``gs`` or ``gcs``.
    bucket : str
        The name of a bucket.
    storage_options : mapping of str to object
        Of fsspec. None stands for an option that is not given.

    Raises
    ------
    CannotTranslateError
        If it cannot; it names the option or variable.

    Examples
    --------
    >>> connection = translate("s3", "bucket", {"anon": True, "endpoint_url": "http://127.0.0.1:9000"})
    >>> connection.config
    {'skip_signature': True, 'endpoint': 'http://127.0.0.1:9000', 'virtual_hosted_style_request': False, 'region': 'us-east-1'}
    """
    if _BUCKET.fullmatch(bucket) is None:
        _refuse("bucket")
    translation = {"s3": _s3, "s3a": _s3, "gs": _gs, "gcs": _gs}.get(scheme)
    if translation is None:
        _refuse("scheme")
    return translation(bucket, storage_options)


def _refuse(option: str) -> NoReturn:
    raise CannotTranslateError(option)


class _Options:
    """A group of options, each to be taken once: what is left at the end cannot be translated."""

    def __init__(self, name: str, given: Mapping[str, Any] | None, ignored: frozenset[str]) -> None:
        self._name = name
        self._left = {key: value for key, value in (given or {}).items() if value is not None and key not in ignored}

    def take(self, key: str, default: Any = None) -> Any:
        return self._left.pop(key, default)

    def refuse_rest(self) -> None:
        for key in sorted(self._left):
            _refuse(f"{self._name}.{key}" if self._name else key)


def _variable(*names: str) -> str | None:
    """The first of these variables of the environment that is set and not empty."""
    return next((value for name in names if (value := os.environ.get(name))), None)


def _refuse_variables(*names: str) -> None:
    for name in names:
        if (os.environ.get(name) or "false").lower() not in {"false", "0", "no"}:
            _refuse(name)


def _seconds(options: _Options, key: str, default: float) -> float:
    value = options.take(key, default)
    return float(value) if isinstance(value, (int, float)) and value > 0 else _refuse(f"config_kwargs.{key}")


def _client_options(url: str, connect_seconds: float = CONNECT_SECONDS) -> dict[str, Any]:
    return {"connect_timeout": f"{int(connect_seconds * 1000)}ms", "allow_http": url.startswith("http:")}


# S3


def _s3(bucket: str, storage_options: Mapping[str, Any]) -> Connection:
    options = _Options("", storage_options, _S3_IGNORED)
    client = _Options("client_kwargs", options.take("client_kwargs"), frozenset())
    boto = _Options("config_kwargs", options.take("config_kwargs"), _BOTOCORE_IGNORED)
    boto_s3 = _Options("config_kwargs.s3", boto.take("s3"), _BOTOCORE_S3_IGNORED)
    _refuse_variables(*_S3_VARIABLES)
    profile = _profile()

    config, keys = _s3_keys(options, client, profile)
    given = [options.take("endpoint_url"), client.take("endpoint_url"), _variable("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")]
    regions = [boto.take("region_name"), client.take("region_name"), _variable("AWS_DEFAULT_REGION", "AWS_REGION"), profile.get("region")]
    style = boto_s3.take("addressing_style", "auto")
    endpoint = next(filter(None, given), None)
    is_plain = [group.take("use_ssl") is False for group in (options, client)]
    if endpoint is None and any(is_plain):
        _refuse("use_ssl")
    config |= _s3_place(bucket, endpoint, next(filter(None, regions), None), style)
    if options.take("requester_pays"):
        config["request_payer"] = True
    config |= _s3_encryption(options.take("s3_additional_kwargs", {}))
    if _sends_checksums(boto) and not config["skip_signature"]:
        # The digest is made for the signature anyway, but not every server compares that with the bytes that come.
        config["checksum_algorithm"] = "SHA256"

    url = config.get("endpoint", "https:")
    client_options = _client_options(url, _seconds(boto, "connect_timeout", CONNECT_SECONDS))
    if url.startswith("https:") and (file := _variable("AWS_CA_BUNDLE")) is not None:
        client_options["root_certificate"] = _read(file) or _refuse("AWS_CA_BUNDLE")
    read_seconds = _seconds(boto, "read_timeout", READ_SECONDS)
    if boto.take("signature_version", "s3v4") != "s3v4":
        _refuse("config_kwargs.signature_version")
    for group in (options, client, boto, boto_s3):
        group.refuse_rest()
    return Connection("s3", bucket, config, client_options, keys, tuple(keys.values()), read_seconds)


def _sends_checksums(boto: _Options) -> bool:
    """Whether servers are told a checksum with what they are to store, as botocore does unless it is told otherwise."""
    name = "request_checksum_calculation"
    said = boto.take(name) or _variable(f"AWS_{name.upper()}") or ""
    return str(said).lower() != "when_required"


def _s3_keys(options: _Options, client: _Options, profile: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Whether requests are signed, and the keys to sign them with, if these are known here."""
    names = (("key", "username"), ("secret", "password"), ("token",))
    explicit = [
        next((value for value in [*map(options.take, own), client.take(f"aws_{name}")] if value), None)
        for own, name in zip(names, _KEY_NAMES, strict=True)
    ]
    if options.take("anon"):
        return {"skip_signature": True}, {}
    config = {"skip_signature": False}
    if explicit[2] and not explicit[0]:
        _refuse("token")
    for key, secret, token in (explicit, [_variable(f"AWS_{name.upper()}") for name in _KEY_NAMES]):
        if key and secret:
            return config, _printable({"access_key_id": key, "secret_access_key": secret, "token": token})
        if key or secret:
            _refuse("secret" if key else "key")
    if profile["has_keys"]:
        _refuse("AWS_SHARED_CREDENTIALS_FILE")
    if _variable("AWS_PROFILE", "AWS_DEFAULT_PROFILE"):
        _refuse("AWS_PROFILE")
    if not _variable(*_CONTAINER):
        _refuse_variables("AWS_EC2_METADATA_DISABLED")
        if _vendor() != "Amazon EC2":
            _refuse("key")
    return config, {}


def _printable(keys: Mapping[str, str | None]) -> dict[str, str]:
    """Those that there are; obstore panics at what cannot stand in a header."""
    found = {name: value for name, value in keys.items() if value}
    if not all(map(_WORD.fullmatch, found.values())):
        _refuse("key")
    return found


def _s3_place(bucket: str, endpoint: str | None, region: str | None, style: str) -> dict[str, Any]:
    """Where the bucket is. botocore names it in the host on AWS, if its name can be one, and in the path elsewhere."""
    if region and not _WORD.fullmatch(region):
        _refuse("client_kwargs.region_name")
    if endpoint is None:
        # botocore follows the server to the region of the bucket; obstore must know it.
        if region is None or region.startswith(_OTHER_DOMAINS):
            _refuse("client_kwargs.region_name")
        return {"virtual_hosted_style_request": style != "path" and "." not in bucket and "_" not in bucket, "region": region}
    url = _checked(endpoint)
    if style == "virtual":
        scheme, _, rest = url.partition("://")
        url = f"{scheme}://{bucket}.{rest}"
    place = {"endpoint": url, "virtual_hosted_style_request": style == "virtual", "region": region or "us-east-1"}
    # obstore would prefer the variable to what it is told.
    return place | ({"aws_endpoint_url_s3": url} if _variable("AWS_ENDPOINT_URL_S3") else {})


def _s3_encryption(given: Mapping[str, Any]) -> dict[str, Any]:
    for key in sorted(given):
        if key not in _ENCRYPTION:
            _refuse(f"s3_additional_kwargs.{key}")
    return {_ENCRYPTION[key]: value for key, value in given.items()}


def _checked(url: str) -> str:
    """The URL of a server: without a password, so that it may be shown, and of a form with which obstore does not panic."""
    found = _URL.fullmatch(url)
    if found is None or int(found[1] or 0) > _LAST_PORT:
        _refuse("endpoint_url")
    return url.rstrip("/")


def _profile() -> dict[str, Any]:
    """What AWS's files say of the profile in use: its region, and whether it has keys; nothing where there are no files."""
    name = _variable("AWS_PROFILE", "AWS_DEFAULT_PROFILE") or "default"
    section = name if name == "default" else f"profile {name}"
    settings = dict(_section("AWS_CONFIG_FILE", "~/.aws/config", section))
    found: dict[str, Any] = {"region": settings.pop("region", None)}
    found["has_keys"] = bool(_section("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", name))
    for key in sorted(settings):
        if key != "output" and not key.startswith("cli_"):
            _refuse(f"AWS_CONFIG_FILE.{key}")
    return found


def _section(variable: str, default: str, section: str) -> list[tuple[str, str]]:
    parser = configparser.RawConfigParser(default_section="")
    try:
        parser.read(Path(_variable(variable) or default).expanduser(), encoding="utf-8")
        is_read = True
    except (OSError, ValueError, configparser.Error):
        is_read = False
    if not is_read:
        _refuse(variable)
    return parser.items(section) if parser.has_section(section) else []


def _vendor() -> str:
    """Who has made this machine; the vendors of the two clouds give it credentials by themselves."""
    return _read(_VENDOR).decode(errors="replace").strip()


def _read(file: str | Path) -> bytes:
    """What is in a file; nothing if it is none, such as a secret in the place of its name."""
    try:
        return Path(file).read_bytes()
    except (OSError, ValueError):
        return b""


# GCS


def _gs(bucket: str, storage_options: Mapping[str, Any]) -> Connection:
    options = _Options("", storage_options, _GS_IGNORED)
    _refuse_variables(*_GS_VARIABLES)
    config = {"skip_signature": False} | _gs_place(options.take("endpoint_url"))
    given, secrets = _gs_token(options.take("token"))
    for key, usual in (("access", "full_control"), ("requester_pays", False), ("consistency", "none"), ("session_kwargs", {})):
        if options.take(key, usual) != usual:
            _refuse(key)
    options.refuse_rest()
    return Connection("gs", bucket, config | given, _client_options("https:"), secrets=secrets)


def _gs_place(endpoint: str | None) -> dict[str, Any]:
    """Where the bucket is. gcsfs speaks JSON and obstore XML: at Google's own servers both are understood, and elsewhere seldom."""
    emulator = _variable("STORAGE_EMULATOR_HOST")
    if endpoint is None and emulator not in {None, "default"}:
        _refuse("STORAGE_EMULATOR_HOST")
    if endpoint is None:
        return {}
    parts = urlsplit(url := _checked(endpoint))
    if parts.scheme != "https" or parts.path or not (parts.hostname or "").endswith(".googleapis.com"):
        _refuse("endpoint_url")
    return {"base_url": url}


def _gs_token(token: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The credentials in obstore's config, and the secrets among them that are known here."""
    if token == "anon":  # noqa: S105 - a word, no secret
        # Without the key it would ask the metadata server for a token before each request that writes.
        return {"skip_signature": True, "service_account_key": json.dumps(_NO_SIGNATURE)}, ()
    if isinstance(token, dict) and token.get("type") == "service_account":
        _refuse_universe(token)
        return {"service_account_key": json.dumps(token)}, _secrets(token)
    if token is None or token == "google_default":  # noqa: S105 - as above
        file = _variable("GOOGLE_APPLICATION_CREDENTIALS") or _default_file()
        if file is None and _vendor() == "Google":
            return {}, ()
    else:
        file = token if isinstance(token, str) else None
    if file is None:
        _refuse("token")
    return _gs_file(file)


def _default_file() -> str | None:
    """Where gcloud keeps the credentials of who has logged in."""
    folder = Path(_variable("CLOUDSDK_CONFIG") or "~/.config/gcloud").expanduser()
    file = folder / "application_default_credentials.json"
    return str(file) if file.is_file() else None


def _gs_file(file: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    try:
        content = json.loads(_read(file))
    except ValueError:
        content = None
    # Others are those of federated identities, and of who acts for someone else.
    kinds = {"service_account": "service_account", "authorized_user": "application_credentials"}
    kind = kinds.get(str(content.get("type"))) if isinstance(content, dict) else None
    if kind is None:
        _refuse("token")
    _refuse_universe(content)
    return {kind: file}, _secrets(content)


def _refuse_universe(account: Mapping[str, Any]) -> None:
    if account.get("universe_domain", "googleapis.com") != "googleapis.com":
        _refuse("token")


def _secrets(account: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(value) for key, value in account.items() if key in _SECRET_NAMES and value)
