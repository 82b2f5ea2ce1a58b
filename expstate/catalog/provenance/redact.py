"""What looks like a secret, and what is recorded in its place: one table of patterns for everything that is gathered or typed freely.

Gets texts, command lines, params and URLs; hands on the same without secrets. A text with a secret in it is replaced as a whole by a
short hash of it; URLs lose user info, query and fragment wherever they stand.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from blake3 import blake3

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        r"://[^\s/@:\"']{0,200}:(?!\d{1,5}(?:[/?#]|$))[^\s@\"'{$<*%][^\s@\"']{0,400}@",  # a password in a URL
        r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY",  # PEM
        r"(?<![A-Za-z0-9])eyJ[\w-]{8,600}\.eyJ[\w-]{8,600}\.",  # JSON web token
        r"(?<![A-Za-z0-9])eyJ[\w-]{100,}",  # base64 of JSON, as API keys
        r"(?<![A-Z0-9])A(?:KIA|SIA)[A-Z0-9]{16}(?![A-Z0-9])",  # AWS
        r"(?<![A-Za-z0-9])gh[pousr]_[A-Za-z0-9]{16,}",  # GitHub
        r"(?<![A-Za-z0-9])github_pat_\w{16,}",
        r"(?<![A-Za-z0-9])gl(?:pat|ptt|dt|rt|soat|cbt)-[\w-]{16,}",  # GitLab
        r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{16,}",  # Hugging Face
        r"(?<![A-Za-z0-9])api_org_[A-Za-z0-9]{16,}",
        r"(?<![\w-])sk-(?:(?:proj|svcacct|admin|ant-\w{3,8}|or-v1)-[\w-]{16,}|[A-Za-z0-9]{20,})",  # OpenAI, Anthropic
        r"(?<![A-Za-z0-9])[sr]k_(?:live|test)_[A-Za-z0-9]{16,}",  # Stripe
        r"(?<![A-Za-z0-9])xox[abeoprs]-[A-Za-z0-9-]{10,}",  # Slack
        r"(?<![A-Za-z0-9])xapp-\d-[A-Za-z0-9-]{10,}",
        r"hooks\.slack\.com/services/\w+/\w+/\w+",
        r"(?<![A-Za-z0-9])AIza[\w-]{35}",  # Google
        r"(?<![A-Za-z0-9])ya29\.[\w-]{16,}",
        r"(?<![A-Za-z0-9])GOCSPX-[\w-]{16,}",
        r"(?<![A-Za-z0-9])(?:npm_[A-Za-z0-9]{30,}|pypi-AgEI[\w-]{16,})",  # registries of packages
        r"(?<![A-Za-z0-9])(?:dapi[0-9a-f]{32}|r8_[A-Za-z0-9]{30,})",  # Databricks, Replicate
        r"(?<![A-Za-z0-9])SG\.[\w-]{16,64}\.[\w-]{16,}",  # SendGrid
        r"(?i)(?:AccountKey|SharedAccessSignature)=[\w+/%=-]{16,}",  # Azure
        r"(?<![^\s\"'=])\??s[a-z]=[^\s\"'&]{1,80}(?:&[a-z]{2,5}=[^\s\"'&]{0,80}){0,12}&sig=[\w%+/=-]{8,}",
        r"(?<![A-Za-z0-9])(?:dckr_pat|do[opr]_v1|figd|glsa|gsk|jina|lin_api|nvapi|pplx|sbp|shp(?:at|ss)|tgp_v1|wandb_v1|whsec|xai)[_-][\w-]{20,}",
        r"(?<![A-Za-z0-9])(?:hv[sb]\.[\w-]{24,}|ATATT3[\w=-]{40,}|AGE-SECRET-KEY-1[A-Z0-9]{20,})",
        r"(?<![A-Za-z0-9])\d{8,10}:AA[\w-]{33}(?![\w-])|discord(?:app)?\.com/api/webhooks/\d+/[\w-]{16,}",  # chats
        r"(?i)\bauthorization[\"']?\s{0,4}[:=,]\s{0,4}[\"']?\w{1,20}\s{1,4}[\w.~+/=-]{8,}",
        r"(?i)\bbearer\s{1,4}(?=[\w.~+/=-]{0,200}\d)[\w.~+/=-]{16,}",
        r"(?i)(?:\bwandb\s{1,4}login\s(?:--\S{1,40}\s){0,8}|(?:login|key|token)\W{1,12})[0-9a-f]{40}(?![0-9a-f])",  # Weights & Biases
        # Commands that take a password by a short flag.
        r"\bcurl\s(?:[^\n]{0,300}?\s)?(?:-u|--user)[ =]?[\"']?[^\s:\"'$]{1,80}:[^\s\"'${<*]",
        r"\bsshpass\s{1,4}-p\s?[^\s$]|\b(?:docker|podman)\s{1,4}login\s(?:[^\n]{0,200}?\s)?-p\s?[^\s$]",
        r"\bmysql(?:dump|admin)?\s(?:[^\n]{0,200}?\s)?-p[^\s$]",
        r"(?i)(?:\bauth\s{0,4}=\s{0,4}|basic_?auth)\(\s{0,4}[\"'][^\"'\n]{1,100}[\"']\s{0,4},\s{0,4}[\"'][^\"'\n]{4,400}[\"']\s{0,4}\)",
    )
)

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def _words(name: str) -> list[str]:
    """The words of a name in any spelling, in lower case."""
    return [word.lower() for word in _WORD.findall(name)]


# What a name says last is what it names: "key_dim" is a dimension, "token_file" a file.
_SECRET_WORDS = frozenset(("secret", "password", "passwd", "passphrase", "credential", "credentials", "apikey", "authtoken", "accesskey"))
_SECRET_NAMES = [[word] for word in _SECRET_WORDS]
_DOUBTFUL_WORDS = frozenset(("token", "key", "pass", "pwd", "pat"))
_OWNERS = _SECRET_WORDS | set(
    _words(
        "access account admin anthropic api app auth aws azure bearer bot client comet db deploy encryption gcp gh github gitlab google "
        "hf hub huggingface jwt kaggle license login master mlflow my mysql neptune oauth openai pg personal postgres private pull push "
        "read redis refresh root security service session shared signing slack smtp ssh sso storage sudo upload user wandb write"
    )
)
"""With one of these before it a token or key is a secret; with another word it may be one."""
_NO_OWNERS = set(
    _words(
        "answer begin best bos cache class cls column data dict dtype end eos feature fim first foreign group hash image index input "
        "instance join label last lookup map mask max metric min monitor n next no num object output pad param partition per placeholder "
        "prev primary prng prompt public query random rng row s sample sep seq sort special start state stop sub target text trigger unk "
        "word"
    )
)
"""With one of these before it a token or key is none: ``pad_token``, ``sort_key``."""
_SECRET_ENDS = tuple(_SECRET_WORDS)
_FUSED = frozenset(owner + word for owner in _OWNERS for word in ("token", "key", "pass", "pwd"))
"""Words that were written as one, as ``hftoken``; ``PGPASSWORD`` is known by its end."""
_FILLERS = frozenset(("value", "text", "str", "string", "plain", "plaintext", "raw", "new", "old", "default"))
_NO, _PERHAPS, _YES = range(3)

_PLACEHOLDER = re.compile(
    r"(?i:true|false|yes|no|on|off|none|null|auto|default|inf|nan|\?+|\*+|\.+|x+|changeme|redacted|your[\w -]*)"
    r"|<[^<>]*>|\[[^\[\]]*\]|(?:\$?\{[^{}]*\}+[-_./ ]?)+|\$[A-Z_]+|%\(\w+\)s|"  # special tokens, hashes, nothing
)
_HARMLESS = re.compile(
    r"[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?%?"  # a number
    rf"|{_PLACEHOLDER.pattern}"
    r"|.{0,3}",
    re.DOTALL,
)
_PART_OF_NAME = re.compile(r"[A-Za-z]*\d{0,4}[A-Za-z]{0,3}")
_MIXED = re.compile(r"(?=[^\d]*\d)(?=[^A-Za-z]*[A-Za-z])[\w+/=.~:-]{16,}")
_FILE = re.compile(r"~?\.{0,2}/.*|.*\.\w{1,5}")

_KEYWORD = (
    r"(?i:passw(?:or)?d|passphrase|secret|credentials?|api_?key|token|key|pass|pwd)"
    r"(?:_[a-z0-9_]{1,20}|_?[A-Z0-9_]{1,20}|[A-Z][A-Za-z0-9]{1,20})?"
)
_QUOTED = re.compile(
    _KEYWORD + r"[\"']?\]?(?P<between>\s{0,8}(?::\s{0,8}[\w.]{1,40}\s{1,8})?(?:=(?![=])|:|,)\s{0,8})[rbfuRBFU]{0,2}"
    r"(?P<quote>[\"'])(?P<value>(?:(?!(?P=quote))[^\n]){4,400})(?P=quote)"
)
_UNQUOTED = re.compile(_KEYWORD + r"(?:[ \t]{0,4}=[ \t]{0,4}|:[ \t]{1,4})(?P<value>[^\s\"'()\[\]{},;<>=]{4,400}=*)(?=[\s;\"']|$)")
_FLAG = re.compile(r"(?<![\w-])--(?P<name>[A-Za-z][\w.-]{0,60})[ \t]{1,4}[\"']?(?P<value>[^\s\"'()\[\]{},;<>=]{4,400}=*)(?=[\s;\"']|$)")
_VARIABLE = (  # what is set in the environment is meant as it stands
    re.compile(r"(?:%(?:set_)?env|\bexport)[ \t]{1,4}(?P<name>\w{1,80})(?:=|[ \t]{1,4})[\"']?(?P<value>[^\s\"'$`{]{4,400})"),
    re.compile(r"(?:setdefault|putenv|setenv)\(\s{0,8}[\"'](?P<name>\w{1,80})[\"']\s{0,8},\s{0,8}[\"'](?P<value>[^\"'\n]{4,400})[\"']"),
)
_KEYWORD_AT = re.compile(_KEYWORD)
_NAME_BEFORE = re.compile(r"[\w.-]{0,80}\Z")
_CONNECTION = re.compile(
    r"(?i)\b(?:host|server|data source|user(?: id)?|uid|dbname|database|port)=\S[^\n]{0,400}?\b(?:password|pwd)=[^\s{$<*]"
    r"|\b(?:password|pwd)=[^\s{$<*]\S{0,200}[ ;]\s?(?:host|server|user(?: id)?|uid|dbname|database|port)="
)
"""What a driver of a database is given as a text."""
_ATTRIBUTE = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
_URL = re.compile(r"://[^\s\"'`<>\\]+")
_AFTER_URL = re.compile(r"[)\].,;}]*\Z")


def hashed(text: str) -> str:
    """What stands in the place of a secret: the same for the same text.

    >>> hashed("hunter2")
    '[secret 55dcd122]'
    """
    return f"[secret {blake3(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}]"


def url(text: str) -> str:
    """A URL without user info, query and fragment.

    >>> url("https://user:token@host:8443/owner/repo.git?sig=1#top")
    'https://host:8443/owner/repo.git'
    """
    scheme, mark, rest = text.partition("://")
    return f"{scheme}{mark}{_bare(rest)}" if mark else text


def _bare(rest: str) -> str:
    """What follows ``://``, without user info, query and fragment."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in authority:
        rest = rest[authority.rindex("@") + 1 :]
    elif ":" in authority and not authority.startswith("[") and not authority.rpartition(":")[2].isdigit():
        # No port, so it is a password with a slash in it.
        rest = rest.rpartition("@")[2] if "@" in rest else rest
    return re.split(r"[?#]", rest, maxsplit=1)[0]


def text(given: str) -> str:
    """A text as it may be recorded: as it is, with URLs cut short, or a hash of the whole.

    >>> text("see https://host/page?id=3, it explains the loss")
    'see https://host/page, it explains the loss'
    >>> text('client = Client(api_key="a-long-word")').startswith("[secret ")
    True
    """
    if is_secret(given):
        return hashed(given)
    if "://" not in given:
        return given

    def cut(match: re.Match[str]) -> str:
        found = match.group()
        end = _AFTER_URL.search(found)
        assert end is not None
        return f"://{_bare(found[3 : end.start()])}{end.group()}"

    return _URL.sub(cut, given)


def is_secret(given: str) -> bool:
    """Whether a text holds what looks like a secret."""
    return any(pattern.search(given) for pattern in _PATTERNS) or _CONNECTION.search(given) is not None or any(_assigned(given))


def _assigned(given: str) -> Iterator[bool]:
    """Whether each value that is given to a name in a text or in code is one."""
    for match in _QUOTED.finditer(given):
        grade = _grade(_whole_name(given, match))
        value = match["value"]
        if "," in match["between"]:
            yield bool(grade) and _is_random(value)
        else:
            yield _is_value(value) and (grade == _YES or (grade == _PERHAPS and _is_random(value)))
    for pattern in _VARIABLE:
        for match in pattern.finditer(given):
            yield _is_value(match["value"]) and _grade(match["name"]) == _YES
    for match in _UNQUOTED.finditer(given):
        yield _is_bare_secret(_grade(_whole_name(given, match)), match["value"])
    for match in _FLAG.finditer(given):
        yield _is_bare_secret(_grade(match["name"]), match["value"])


def _is_bare_secret(grade: int, value: str) -> bool:
    # What stands in code without quotes is mostly a name, which has no sign and seldom a digit.
    if grade == _YES and _is_value(value) and not _ATTRIBUTE.fullmatch(value) and not _KEYWORD_AT.match(value):
        return any(character.isdigit() for character in value) or not re.fullmatch(r"[\w.:/-]+", value)
    return bool(grade) and _is_random(value)


def _whole_name(given: str, match: re.Match[str]) -> str:
    before = _NAME_BEFORE.search(given, max(0, match.start() - 80), match.start())
    after = re.match(r"[\w.-]*", match.group())
    return (before.group() if before else "") + (after.group() if after else "")


def _grade(name: str) -> int:
    """Whether what goes by this name is a secret: no, perhaps (if it looks like one), or yes.

    >>> [_grade(name) for name in ("api_key", "hubToken", "--db-password", "model.key", "tokenizer", "max-tokens", "key-dim", "pad_token")]
    [2, 2, 2, 1, 0, 0, 0, 0]
    >>> [_grade(name) for name in ("PGPASSWORD", "hftoken", "monkey", "bypass")]
    [2, 2, 0, 0]
    """
    above, _, own = name.rpartition(".")
    words = _words(own)
    while words and (words[-1] in _FILLERS or len(words[-1]) == 1):
        words.pop()
    if not words:
        return _NO
    last, others = words[-1], frozenset(words[:-1])
    if last in _FUSED or last.endswith(_SECRET_ENDS):
        return _YES
    if last not in _DOUBTFUL_WORDS or not others.isdisjoint(_NO_OWNERS):
        return _NO
    if not _OWNERS.isdisjoint([*others, *_words(above)]) or (last == "token" and not others):
        return _YES
    return _PERHAPS


def _is_value(value: str) -> bool:
    return _HARMLESS.fullmatch(value.strip()) is None


def _is_placeholder(value: str) -> bool:
    return _PLACEHOLDER.fullmatch(value.strip()) is not None


def _is_random(value: str) -> bool:
    """Whether a text is long, without spaces, and no name that a person would choose.

    >>> _is_random("Zk3v9QpL0aXw82Tb"), _is_random("val_accuracy_top_5"), _is_random("EleutherAI/pythia-160m-v0")
    (True, False, False)
    """
    if _MIXED.fullmatch(value) is None or _FILE.fullmatch(value) is not None:
        return False
    return not all(_PART_OF_NAME.fullmatch(part) for part in re.split(r"[_\-./:=+~]+", value))


def _hides(name: str, value: str) -> bool:
    """Whether what goes by this name, which a flag has or a param, must not be shown."""
    grade = _grade(name)
    if grade == _YES:
        return not _is_placeholder(value)
    return grade == _PERHAPS and (_is_random(value) or (name.startswith("-") and _is_value(value)))


def named(name: str, value: str) -> str:
    """The value of a variable or param, by its name and by what it is.

    >>> named("hub_token", "abcdef"), named("pad_token", "<pad>"), named("max_tokens", "128")
    ('[secret b34b5607]', '<pad>', '128')
    """
    if _hides(name, value):
        is_path = "credential" in name.lower() and _FILE.fullmatch(value) is not None
        return value if is_path and not is_secret(value) else hashed(value)
    return text(value)


def argv(items: Iterable[str]) -> list[str]:
    """A command line; the values of flags that are named like a secret are replaced, whatever they are.

    >>> argv(["train.py", "--lr", "0.1", "--max-tokens", "100", "--tokenizer", "bert", "--hf-token", "abcdef"])
    ['train.py', '--lr', '0.1', '--max-tokens', '100', '--tokenizer', 'bert', '--hf-token', '[secret b34b5607]']
    """
    found: list[str] = []
    flag = ""
    for item in items:
        name, mark, value = item.partition("=")
        is_flag = item.startswith("--") or re.fullmatch(r"-[A-Za-z][A-Za-z_-]*", name) is not None
        if flag and not is_flag and _hides(flag, item):
            found.append(hashed(item))
        elif mark and re.fullmatch(r"[-+~]{0,2}[\w./@-]+", name) and _hides(name, value):
            found.append(f"{name}={hashed(value)}")
        else:
            found.append(text(item))
        flag = item if is_flag and not mark else ""
    return found


def tree(value: Any, name: str = "", replaced: list[str] | None = None, *, secret: bool = False) -> Any:
    """A value with all in it that is a dict, list, tuple or set; what is not changed is the same object.

    Parameters
    ----------
    value : Any
        Texts and bytes in it are looked at.
    name : str, default ""
        What it goes by; names of parts are joined by dots.
    replaced : list of str, optional
        Gets the names of what was replaced.
    secret : bool, default False
        Whether it is part of what is named like a secret, so that every text in it is one.
    """
    if isinstance(value, str):
        found: Any = hashed(value) if secret and not _is_placeholder(value) else named(name, value)
    elif isinstance(value, (bytes, bytearray)):
        plain = bytes(value).decode("latin-1")
        found = value if not secret and named(name, plain) == plain else hashed(plain)
    elif isinstance(value, dict):
        secret = secret or _words(name.rpartition(".")[2])[-1:] in _SECRET_NAMES
        items = {key: tree(item, f"{name}.{key}" if name else str(key), replaced, secret=secret) for key, item in value.items()}
        return value if all(items[key] is item for key, item in value.items()) else items
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = [tree(item, name, replaced, secret=secret) for item in value]
        if all(part is item for part, item in zip(parts, value, strict=True)):
            return value
        return list(parts) if isinstance(value, list) else set(parts) if isinstance(value, (set, frozenset)) else tuple(parts)
    else:
        return value
    if found == value:
        return value
    if replaced is not None:
        replaced.append(name)
    return found


def params(given: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """Params, and the names of those that were replaced.

    >>> params({"lr": 0.1, "hub": {"token": "abcdef", "repo": "me/model"}})
    ({'lr': 0.1, 'hub': {'token': '[secret b34b5607]', 'repo': 'me/model'}}, ['hub.token'])
    """
    replaced: list[str] = []
    found = {name: tree(value, str(name), replaced) for name, value in given.items()}
    return (found, replaced) if replaced else (given, replaced)
