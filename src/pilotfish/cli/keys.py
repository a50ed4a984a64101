"""`pilotfish keys`: names in, API keys out; each is shown once."""

from __future__ import annotations

import base64
import secrets
from datetime import UTC, datetime

from pilotfish.cli.serve import missing_extra
from pilotfish.cli.server_verbs import Keys
from pilotfish.cli.terminal import table
from pilotfish.errors import SettingError


def run(config: Keys) -> int:
    try:
        from pilotfish.server import Store, new_key
        from pilotfish.server.sinks import SECRET_PREFIX
    except ModuleNotFoundError as error:
        raise missing_extra("serve", error) from error
    if config.do == "secret":
        print(SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode())
        return 0
    store = Store(config.store)
    if config.do == "list":
        rows = [
            [row.id, row.name, row.scopes, _day(row.created_s), "" if row.revoked_s is None else _day(row.revoked_s)]
            for row in store.keys()  # noqa: SIM118  # a method of the store, not of a dict
        ]
        print(table(["id", "name", "scopes", "made", "revoked"], rows))
        return 0
    if not config.name:
        what = "a NAME for the new key" if config.do == "add" else "the ID of the key (`pilotfish keys list`)"
        raise SettingError(f"`pilotfish keys {config.do}` needs {what}")
    if config.do == "revoke":
        if not store.revoke_key(config.name):
            raise SettingError(f"there is no key {config.name!r} in force; `pilotfish keys list` shows them")
        print(f"{config.name} is revoked; running servers refuse it within seconds")
        return 0
    key = new_key(config.name, config.scopes)
    store.add_key(key.row)
    print(key.secret)
    return 0


def _day(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).date().isoformat()
