"""The SQLite schema and its migrations. A database written by a newer controller is refused.

Documents whose inside is never searched are JSON columns; what a query or a decision reads has a
column of its own.
"""

from __future__ import annotations

from sqlite_utils import Database, Migrations

from remora_contract.errors import Refused

migrations = Migrations("remora_controller")

_FIRST = """
CREATE TABLE devices (
  device_id TEXT PRIMARY KEY,
  enrolled_at REAL NOT NULL,
  key_fingerprint TEXT NOT NULL,
  hostname TEXT NOT NULL,
  facts TEXT NOT NULL,
  device_labels TEXT NOT NULL,
  operator_labels TEXT NOT NULL,
  report TEXT NOT NULL,
  progress REAL NOT NULL,
  trail TEXT NOT NULL,
  last_seen REAL,
  events_up_to INTEGER NOT NULL,
  quarantine TEXT,
  removed_at REAL
);
CREATE TABLE join_tokens (
  secret_sha256 TEXT PRIMARY KEY,
  labels TEXT NOT NULL,
  created_at REAL NOT NULL,
  expires_at REAL NOT NULL,
  created_by TEXT NOT NULL,
  used_by TEXT
);
CREATE TABLE releases (
  release_id TEXT PRIMARY KEY,
  name TEXT NOT NULL,
  document BLOB NOT NULL,
  created_at REAL NOT NULL,
  created_by TEXT NOT NULL
);
CREATE INDEX releases_by_name ON releases (name, created_at);
CREATE TABLE rollouts (
  rollout_id TEXT PRIMARY KEY,
  release_id TEXT NOT NULL REFERENCES releases (release_id),
  selector TEXT NOT NULL,
  spec TEXT NOT NULL,
  waves INTEGER NOT NULL,
  created_at REAL NOT NULL,
  created_by TEXT NOT NULL,
  state TEXT NOT NULL,
  reason TEXT NOT NULL,
  wave INTEGER NOT NULL,
  clock_at REAL NOT NULL,
  keep INTEGER NOT NULL,
  finished_at REAL,
  version INTEGER NOT NULL
);
CREATE TABLE rollout_devices (
  rollout_id TEXT NOT NULL REFERENCES rollouts (rollout_id),
  device_id TEXT NOT NULL REFERENCES devices (device_id),
  wave INTEGER NOT NULL,
  position INTEGER NOT NULL,
  generation INTEGER,
  rollback_generation INTEGER,
  PRIMARY KEY (rollout_id, device_id)
);
CREATE INDEX rollout_devices_by_device ON rollout_devices (device_id);
CREATE TABLE assignments (
  device_id TEXT NOT NULL REFERENCES devices (device_id),
  generation INTEGER NOT NULL,
  release_id TEXT REFERENCES releases (release_id),
  rollout_id TEXT REFERENCES rollouts (rollout_id),
  soak_s REAL NOT NULL,
  is_rollback INTEGER NOT NULL,
  created_at REAL NOT NULL,
  phase TEXT,
  error TEXT NOT NULL,
  PRIMARY KEY (device_id, generation)
) WITHOUT ROWID;
CREATE TABLE events (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  at REAL NOT NULL,
  device_id TEXT NOT NULL,
  name TEXT NOT NULL,
  detail_json TEXT NOT NULL
);
CREATE INDEX events_by_device ON events (device_id, id);
CREATE INDEX events_by_name ON events (name, id);
CREATE TABLE metrics_latest (
  device_id TEXT NOT NULL,
  name TEXT NOT NULL,
  value REAL NOT NULL,
  at REAL NOT NULL,
  PRIMARY KEY (device_id, name)
) WITHOUT ROWID;
CREATE TABLE metrics_history (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  device_id TEXT NOT NULL,
  name TEXT NOT NULL,
  value REAL NOT NULL,
  at REAL NOT NULL
);
CREATE INDEX metrics_history_by_name ON metrics_history (device_id, name, at);
CREATE INDEX metrics_history_by_time ON metrics_history (at);
"""


def m0001_first(db: Database) -> None:
    db.executescript(_FIRST)


migrations(name="m0001_first")(m0001_first)

_GATES = """
ALTER TABLE rollouts ADD COLUMN accepted_wave INTEGER NOT NULL DEFAULT 0;
ALTER TABLE rollouts ADD COLUMN retry_of TEXT;
ALTER TABLE rollouts ADD COLUMN attempt INTEGER NOT NULL DEFAULT 1;
ALTER TABLE rollout_devices ADD COLUMN bucket INTEGER NOT NULL DEFAULT 0;
ALTER TABLE assignments ADD COLUMN served_at REAL;
ALTER TABLE assignments ADD COLUMN download_bytes_per_s INTEGER;
CREATE TABLE gate_baselines (
  rollout_id TEXT NOT NULL REFERENCES rollouts (rollout_id),
  device_id TEXT NOT NULL REFERENCES devices (device_id),
  series TEXT NOT NULL,
  PRIMARY KEY (rollout_id, device_id)
) WITHOUT ROWID;
"""


def m0002_gates(db: Database) -> None:
    db.executescript(_GATES)


migrations(name="m0002_gates")(m0002_gates)

# Who may do what is a matter of certificates; here is who may no longer, and who did what. The
# audit log only grows: audit_head says up to where, so that cut-off entries are missed too.
_GOVERNANCE = """
ALTER TABLE devices ADD COLUMN quarantined_by TEXT NOT NULL DEFAULT '';
ALTER TABLE devices ADD COLUMN pin TEXT;
ALTER TABLE rollouts ADD COLUMN needs_approval INTEGER NOT NULL DEFAULT 0;
ALTER TABLE rollouts ADD COLUMN approved_by TEXT NOT NULL DEFAULT '';
CREATE TABLE device_groups (
  name TEXT PRIMARY KEY,
  device_ids TEXT,
  selector TEXT,
  created_at REAL NOT NULL,
  created_by TEXT NOT NULL
);
CREATE TABLE revoked_operators (
  name TEXT PRIMARY KEY,
  at REAL NOT NULL
);
CREATE TABLE audit (
  seq INTEGER PRIMARY KEY,
  at REAL NOT NULL,
  who TEXT NOT NULL,
  role TEXT NOT NULL,
  place TEXT NOT NULL,
  what TEXT NOT NULL,
  detail_json TEXT NOT NULL,
  answers INTEGER NOT NULL,
  result TEXT NOT NULL,
  message TEXT NOT NULL,
  hash TEXT NOT NULL
);
CREATE INDEX audit_by_time ON audit (at);
CREATE TABLE audit_head (
  id INTEGER PRIMARY KEY CHECK (id = 1),
  seq INTEGER NOT NULL,
  hash TEXT NOT NULL
);
INSERT INTO audit_head VALUES (1, 0, '');
CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit
BEGIN SELECT RAISE(ABORT, 'the audit log only grows'); END;
CREATE TRIGGER audit_is_not_deleted BEFORE DELETE ON audit
BEGIN SELECT RAISE(ABORT, 'the audit log only grows'); END;
"""


def m0003_governance(db: Database) -> None:
    db.executescript(_GOVERNANCE)


migrations(name="m0003_governance")(m0003_governance)

# Engines that devices share: who builds one, who waits for it, who was told to fetch it.
_SHARING = """
CREATE TABLE engine_tickets (
  key TEXT NOT NULL,
  scope TEXT NOT NULL,
  key_json TEXT NOT NULL,
  ticket TEXT NOT NULL,
  used_at REAL NOT NULL,
  PRIMARY KEY (key, scope)
) WITHOUT ROWID;
CREATE TABLE engine_askers (
  key TEXT NOT NULL,
  scope TEXT NOT NULL,
  device_id TEXT NOT NULL,
  since REAL,
  taken INTEGER NOT NULL,
  PRIMARY KEY (key, scope, device_id)
) WITHOUT ROWID;
"""


def m0004_engine_sharing(db: Database) -> None:
    db.executescript(_SHARING)


migrations(name="m0004_engine_sharing")(m0004_engine_sharing)

# Devices that took a release after its waves: how far they are judged, and by what it ended.
_LATE = """
ALTER TABLE rollout_devices ADD COLUMN late TEXT NOT NULL DEFAULT '';
ALTER TABLE rollout_devices ADD COLUMN late_detail TEXT NOT NULL DEFAULT '';
CREATE INDEX rollout_devices_judged ON rollout_devices (late) WHERE late = 'JUDGING';
CREATE INDEX rollout_devices_flagged ON rollout_devices (late)
  WHERE late IN ('JUDGING', 'SENT_BACK', 'FAILED', 'INCONCLUSIVE');
"""


def m0005_late(db: Database) -> None:
    db.executescript(_LATE)


migrations(name="m0005_late")(m0005_late)


def m0006_held(db: Database) -> None:
    """Which artifacts lie on a device's disk; "" until it says."""
    db.executescript("ALTER TABLE devices ADD COLUMN held TEXT NOT NULL DEFAULT '';")


migrations(name="m0006_held")(m0006_held)


# What arms of experiments counted: newest totals alone, counts as JSON by name.
_EXPERIMENTS = """
CREATE TABLE experiment_counts (
  device_id TEXT NOT NULL REFERENCES devices (device_id),
  label TEXT NOT NULL,
  at REAL NOT NULL,
  counts TEXT NOT NULL,
  PRIMARY KEY (device_id, label)
) WITHOUT ROWID;
"""


def m0007_experiments(db: Database) -> None:
    db.executescript(_EXPERIMENTS)


migrations(name="m0007_experiments")(m0007_experiments)

MIGRATION_NAMES = frozenset(
    {
        "m0001_first",
        "m0002_gates",
        "m0003_governance",
        "m0004_engine_sharing",
        "m0005_late",
        "m0006_held",
        "m0007_experiments",
    }
)


def migrate(db: Database, path: str) -> None:
    """Brings the database up to this version. Raises Refused for a newer one."""
    unknown = {m.name for m in migrations.applied(db)} - MIGRATION_NAMES
    if unknown:
        raise Refused(
            f"{path} was written by a newer controller (it has {', '.join(sorted(unknown))}); "
            "install that version, or restore the backup made before it"
        )
    migrations.apply(db)
