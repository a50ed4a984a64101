"""Exchanges in, rows in SQLite or PostgreSQL out; an alert is committed together with what it is about."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, create_engine, delete, event, func, insert, or_, select, update
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.orm import Session

from pilotfish.errors import SettingError, StoreError
from pilotfish.server.exchanges import Exchange, alert_row, exchange_row, last_turn, token_row, verdict_row
from pilotfish.server.tables import AlertRow, DeliveryRow, ExchangeRow, KeyRow, PolicyRow, TokenRow, VerdictRow

logger = logging.getLogger(__name__)

BUSY_TIMEOUT_S = 10
BATCH = 500
"""Exchanges that retention deletes in one transaction."""
EXCERPT = 400
"""Characters of an answer's beginning in a list."""


class Due(NamedTuple):
    """A delivery that this process may try now."""

    id: int
    attempts: int
    """Tries before this one."""
    payload: dict[str, Any]


class Recorded(NamedTuple):
    """Alerts that were new."""

    alert_ids: tuple[str, ...]


class Store:
    """One database. Methods block; each is one transaction and safe to call from any thread or process."""

    def __init__(
        self, url: str, *, sinks: Sequence[str] = (), redact: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        """Opens the database and brings its tables up to date.

        Args:
            url: `sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST/NAME`.
            sinks: names of the sinks that every new alert is to be delivered to.
            redact: keep neither texts nor token ids, only scores, positions and verdicts.

        Raises:
            SettingError: the URL is none of these.
            StoreError: the database cannot be reached, or was written by a newer Pilotfish.
        """
        self._engine = _engine(url)
        self._is_sqlite = self._engine.dialect.name == "sqlite"
        self._writer = self._engine.execution_options(writes=True)
        self._sinks, self._redact, self._clock = tuple(sinks), redact, clock
        try:
            with self._said("opened"), self._writer.begin() as connection:
                migrate(connection)
        except StoreError:
            self.close()
            raise

    @property
    def takes_parallel_writes(self) -> bool:
        """Whether several threads may write at once; SQLite lets one at a time."""
        return not self._is_sqlite

    def close(self) -> None:
        self._engine.dispose()

    def ping(self) -> None:
        """Raises StoreError when the database does not answer."""
        with self._said("read"), self._engine.connect() as connection:
            connection.execute(select(1))

    # Exchanges and alerts.

    def record(self, exchange: Exchange) -> Recorded:
        """Writes what is known of an exchange, in place of what was known before, and its new alerts with their
        deliveries, in one transaction.

        Raises:
            StoreError: nothing was written.
        """
        now_s = self._clock()
        with self._writing() as session:
            session.merge(ExchangeRow(**exchange_row(exchange, redact=self._redact)))
            session.flush()
            for table in (TokenRow, VerdictRow):
                session.execute(delete(table).where(table.exchange_id == exchange.id))
            tokens = [token_row(exchange.id, token, redact=self._redact) for token in exchange.tokens]
            verdicts = [verdict_row(exchange.id, i, verdict) for i, verdict in enumerate(exchange.verdicts)]
            for table, rows in ((TokenRow, tokens), (VerdictRow, verdicts)):
                if rows:
                    session.execute(insert(table), rows)
            return Recorded(tuple(self._add_alerts(session, exchange, now_s)))

    def _add_alerts(self, session: Session, exchange: Exchange, now_s: float) -> Iterator[str]:
        query = select(AlertRow.metric, AlertRow.action).where(AlertRow.exchange_id == exchange.id)
        known = {(metric, action) for metric, action in session.execute(query)} if exchange.verdicts else set()
        for verdict in exchange.alerts:
            if (verdict.metric, verdict.action) in known:
                continue
            row = alert_row(exchange, verdict, now_s=now_s, redact=self._redact)
            session.execute(insert(AlertRow), [row])
            deliveries = [
                {"alert_id": row["id"], "sink": sink, "state": "pending", "attempts": 0, "due_s": now_s}
                | {"leased_until_s": 0.0}
                for sink in self._sinks
            ]
            if deliveries:
                session.execute(insert(DeliveryRow), deliveries)
            yield row["id"]

    def exchanges(
        self, *, limit: int, before_s: float | None = None, flagged: bool = False, metric: str = "", text: str = ""
    ) -> list[dict[str, Any]]:
        """The newest exchanges first, without their tokens; `before_s` goes on where a list ended.

        Args:
            flagged: those with an alert alone.
            metric: those with an alert of this metric alone.
            text: those whose prompt or answer holds it alone, in whichever case.
        """
        query = select(ExchangeRow).order_by(ExchangeRow.created_s.desc()).limit(limit)
        if before_s is not None:
            query = query.where(ExchangeRow.created_s < before_s)
        if flagged or metric:
            owners = select(AlertRow.exchange_id)
            query = query.where(ExchangeRow.id.in_(owners.where(AlertRow.metric == metric) if metric else owners))
        if text:
            held = (column.icontains(text, autoescape=True) for column in (ExchangeRow.prompt, ExchangeRow.answer))
            query = query.where(or_(*held))
        with self._reading() as session:
            rows = list(session.scalars(query))
            found = select(AlertRow.exchange_id, AlertRow.metric, AlertRow.action)
            alerts = list(session.execute(found.where(AlertRow.exchange_id.in_([row.id for row in rows]))))
            return [
                _plain(row, without=("rounds", "prompt", "answer"))
                | {
                    "asked": _asked(row),
                    "answer_start": None if row.answer is None else row.answer[:EXCERPT],
                }
                | {"alerts": sorted(f"{metric}:{action}" for owner, metric, action in alerts if owner == row.id)}
                for row in rows
            ]

    def exchange(self, exchange_id: str) -> dict[str, Any] | None:
        """One exchange with its tokens and verdicts; None when there is none."""
        with self._reading() as session:
            row = session.get(ExchangeRow, exchange_id)
            if row is None:
                return None
            parts = {}
            for name, table, order in (("tokens", TokenRow, "position"), ("verdicts", VerdictRow, "number")):
                query = select(table).where(table.exchange_id == exchange_id).order_by(getattr(table, order))
                parts[name] = [_plain(part, without=("exchange_id", "number")) for part in session.scalars(query)]
            return _plain(row) | {"asked": _asked(row)} | parts

    def alerts(self, *, limit: int, before_s: float | None = None, state: str | None = None) -> list[dict[str, Any]]:
        """The newest alerts first, each with its deliveries; `state` keeps those that have a delivery in it."""
        query = select(AlertRow).order_by(AlertRow.created_s.desc()).limit(limit)
        if before_s is not None:
            query = query.where(AlertRow.created_s < before_s)
        if state is not None:
            query = query.where(AlertRow.id.in_(select(DeliveryRow.alert_id).where(DeliveryRow.state == state)))
        with self._reading() as session:
            rows = list(session.scalars(query))
            found = (
                select(DeliveryRow).where(DeliveryRow.alert_id.in_([row.id for row in rows])).order_by(DeliveryRow.id)
            )
            hidden = ("id", "alert_id", "lease", "leased_until_s")
            deliveries = [(item.alert_id, _plain(item, without=hidden)) for item in session.scalars(found)]
        return [
            _plain(row, without=("payload",)) | {"deliveries": [item for owner, item in deliveries if owner == row.id]}
            for row in rows
        ]

    # The outbox.

    def claim(self, sink: str, *, owner: str, limit: int, lease_s: float) -> list[Due]:
        """Takes deliveries that are due and that nobody else works on, for `lease_s` seconds; oldest first."""
        now_s = self._clock()
        query = (
            select(DeliveryRow, AlertRow.payload)
            .join(AlertRow, AlertRow.id == DeliveryRow.alert_id)
            .where(DeliveryRow.sink == sink, DeliveryRow.state == "pending")
            .where(DeliveryRow.due_s <= now_s, DeliveryRow.leased_until_s <= now_s)
            .order_by(DeliveryRow.due_s, DeliveryRow.id)
            .limit(limit)
        )
        if not self._is_sqlite:
            query = query.with_for_update(of=DeliveryRow, skip_locked=True)
        with self._writing() as session:
            due = []
            for row, payload in session.execute(query):
                row.lease, row.leased_until_s = owner, now_s + lease_s
                due.append(Due(row.id, row.attempts, payload))
            return due

    def settle(self, due: Due, *, owner: str, error: str | None, retry_in_s: float | None) -> None:
        """Says how a try went: delivered (no error), to be tried again, or dead (`retry_in_s` None). Without effect
        when the lease has gone to another.
        """
        now_s = self._clock()
        values: dict[str, Any] = {"attempts": due.attempts + 1, "lease": None, "leased_until_s": 0.0, "error": error}
        if error is None:
            values |= {"state": "delivered", "delivered_s": now_s}
        elif retry_in_s is None:
            values |= {"state": "dead"}
        else:
            values |= {"due_s": now_s + retry_in_s}
        with self._writing() as session:
            query = update(DeliveryRow).where(DeliveryRow.id == due.id, DeliveryRow.lease == owner)
            session.execute(query.values(**values))

    def revive(self, alert_id: str) -> int:
        """Puts the dead deliveries of an alert back in the queue; returns how many."""
        with self._writing() as session:
            query = update(DeliveryRow).where(DeliveryRow.alert_id == alert_id, DeliveryRow.state == "dead")
            done = session.execute(query.values(state="pending", attempts=0, due_s=self._clock()))
            return int(done.rowcount)  # type: ignore[attr-defined]  # an UPDATE gives a CursorResult

    def outbox(self) -> dict[tuple[str, str], int]:
        """How many deliveries are in each state, per sink."""
        query = select(DeliveryRow.sink, DeliveryRow.state, func.count()).group_by(DeliveryRow.sink, DeliveryRow.state)
        with self._reading() as session:
            return {(sink, state): count for sink, state, count in session.execute(query)}

    # Housekeeping.

    def sweep(self, *, keep_s: float | None, lost_after_s: float) -> int:
        """Deletes exchanges older than `keep_s`, all that hangs on them included, except those with a delivery
        still pending; returns how many. One that runs for longer than `lost_after_s` ended with its process.
        """
        now_s = self._clock()
        with self._writing() as session:
            lost = update(ExchangeRow).where(ExchangeRow.state == "running")
            session.execute(lost.where(ExchangeRow.created_s < now_s - lost_after_s).values(state="interrupted"))
        if keep_s is None:
            return 0
        pending = select(AlertRow.exchange_id).join(DeliveryRow).where(DeliveryRow.state == "pending")
        old = select(ExchangeRow.id).where(ExchangeRow.created_s < now_s - keep_s, ExchangeRow.id.not_in(pending))
        total = 0
        while True:
            with self._writing() as session:
                ids = list(session.scalars(old.limit(BATCH)))
                session.execute(delete(ExchangeRow).where(ExchangeRow.id.in_(ids)))
            total += len(ids)
            if len(ids) < BATCH:
                return total

    # Keys and policies.

    def keys(self) -> list[KeyRow]:
        with self._reading() as session:
            rows = list(session.scalars(select(KeyRow).order_by(KeyRow.created_s)))
            session.expunge_all()
            return rows

    def add_key(self, row: Mapping[str, Any]) -> None:
        with self._writing() as session:
            session.execute(insert(KeyRow), [{**row, "created_s": self._clock()}])

    def revoke_key(self, key_id: str) -> bool:
        with self._writing() as session:
            query = update(KeyRow).where(KeyRow.id == key_id, KeyRow.revoked_s.is_(None))
            return bool(session.execute(query.values(revoked_s=self._clock())).rowcount)  # type: ignore[attr-defined]

    def policy(self) -> dict[str, Any] | None:
        """The newest policy that was put in force over HTTP."""
        with self._reading() as session:
            return session.scalar(select(PolicyRow.document).order_by(PolicyRow.id.desc()).limit(1))

    def set_policy(self, document: Mapping[str, Any], *, key_id: str | None) -> None:
        with self._writing() as session:
            session.add(PolicyRow(created_s=self._clock(), key_id=key_id, document=dict(document)))

    # Transactions.

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        with self._said("written"), Session(self._writer) as session, session.begin():
            yield session

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        with self._said("read"), Session(self._engine) as session:
            yield session

    @contextmanager
    def _said(self, what: str) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, CommandError) as error:
            where = self._engine.url.render_as_string(hide_password=True)
            cause = getattr(error, "orig", None) or error
            raise StoreError(
                f"the store at {where} could not be {what}: {cause}. Check that it is there and has room"
            ) from error


def migrate(connection: Connection) -> None:
    """Brings the tables of an open connection up to date."""
    config = Config()
    config.set_main_option("script_location", "pilotfish.server:migrations")
    config.attributes["connection"] = connection
    if connection.dialect.name == "postgresql":  # two servers that start at once wait for one another
        connection.execute(select(func.pg_advisory_xact_lock(0x70696C6F)))
    command.upgrade(config, "head")


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise SettingError(
            "the store's URL cannot be read; use sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
        ) from error
    if parsed.drivername in {"postgresql", "postgres"}:
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() == "postgresql":
        return create_engine(parsed, pool_pre_ping=True)
    if parsed.get_backend_name() != "sqlite" or not parsed.database or parsed.database == ":memory:":
        raise SettingError(
            f"the store cannot be of kind {parsed.drivername!r} without a file; "
            "use sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
        )
    _make_private(Path(parsed.database))
    engine = create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_S})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _make_private(path: Path) -> None:
    """Transcripts are for their owner's eyes: a new file can be read by nobody else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.touch(mode=0o600)
    except OSError as error:
        raise StoreError(f"{path} cannot be made: {error.strerror}; name another file with --store") from error


def _prepare_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # begin is ours: see below
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    """A transaction that will write takes the lock at once: one that reads first could not get it later."""
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _asked(row: ExchangeRow) -> str | None:
    return None if row.prompt is None else last_turn(row.prompt)


def _plain(row: Any, *, without: Sequence[str] = ()) -> dict[str, Any]:
    return {column.key: getattr(row, column.key) for column in row.__table__.columns if column.key not in without}
