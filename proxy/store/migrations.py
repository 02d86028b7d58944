"""The schema of each file, as the steps that led to it. A step that was released is never changed: add another behind it.

`PRAGMA user_version` counts the steps a file has had. Cached answers have a file of their own: it may be large, and it may
be lost; what is in the main one may not.
"""

MAIN: tuple[str, ...] = (
    """
    CREATE TABLE capability (
        upstream   TEXT NOT NULL,
        model      TEXT NOT NULL,
        credential TEXT NOT NULL,  -- a fingerprint, never the key itself
        topic      TEXT NOT NULL,
        value      INTEGER NOT NULL,
        evidence   TEXT NOT NULL,
        learned_at REAL NOT NULL,  -- Unix seconds
        PRIMARY KEY (upstream, model, credential, topic)
    ) STRICT, WITHOUT ROWID;
    """,
    # Whose calls they are. Nothing here is ever deleted, so that what refers to it stays readable.
    """
    CREATE TABLE accounts_version (version INTEGER NOT NULL) STRICT;  -- one more with each change of the three tables below
    INSERT INTO accounts_version VALUES (1);

    CREATE TABLE organisation (
        id         TEXT PRIMARY KEY,
        name       TEXT NOT NULL,
        created_at REAL NOT NULL,  -- Unix seconds, as all times here
        version    INTEGER NOT NULL  -- that of its last change
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE team (
        id                  TEXT PRIMARY KEY,
        organisation        TEXT NOT NULL REFERENCES organisation,
        name                TEXT NOT NULL,
        models              TEXT NOT NULL,  -- a JSON array of patterns
        requests_per_minute INTEGER,  -- NULL is no limit, as in the two below
        tokens_per_minute   INTEGER,
        parallel_calls      INTEGER,
        is_suspended        INTEGER NOT NULL DEFAULT 0,
        created_at          REAL NOT NULL,
        version             INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE virtual_key (
        id                  TEXT PRIMARY KEY,  -- the part of the key that is shown
        team                TEXT NOT NULL REFERENCES team,
        name                TEXT NOT NULL,
        hash                BLOB NOT NULL,  -- of the whole key, by a secret that is not in this file
        secret              TEXT NOT NULL,  -- a fingerprint of that secret
        models              TEXT NOT NULL,
        requests_per_minute INTEGER,
        tokens_per_minute   INTEGER,
        parallel_calls      INTEGER,
        is_suspended        INTEGER NOT NULL DEFAULT 0,
        expires_at          REAL,  -- NULL is never
        revoked_at          REAL,
        created_at          REAL NOT NULL,
        version             INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX virtual_key_version ON virtual_key (version);

    INSERT INTO organisation VALUES ('local', 'Local', CAST(strftime('%s', 'now') AS REAL), 1);
    INSERT INTO team (id, organisation, name, models, created_at, version)
        VALUES ('local', 'local', 'Local', '["*"]', CAST(strftime('%s', 'now') AS REAL), 1);
    """,
)

CACHE: tuple[str, ...] = (
    # A cached answer is one row here and one in each of the two tables behind it, for SQLite rewrites and reads rows
    # whole: a hit changes a short row, and starting reads short rows.
    """
    CREATE TABLE answer (
        id                INTEGER PRIMARY KEY,
        key               BLOB NOT NULL UNIQUE CHECK (length(key) = 16),
        scope             TEXT NOT NULL,  -- a digest of whose answer it is
        namespace         TEXT NOT NULL,
        model             TEXT NOT NULL,  -- as it was asked for
        target            TEXT NOT NULL,
        size              INTEGER NOT NULL,  -- bytes, over all three tables
        prompt_tokens     INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        duration_s        REAL NOT NULL,
        created_at        REAL NOT NULL,  -- Unix seconds, as all times here
        expires_at        REAL,  -- NULL is never
        used_at           REAL NOT NULL,
        hits              INTEGER NOT NULL DEFAULT 0,
        rights            INTEGER NOT NULL DEFAULT 0,
        wrongs            INTEGER NOT NULL DEFAULT 0,
        lowest_right      REAL,
        highest_wrong     REAL
    ) STRICT;

    CREATE TABLE answer_body (
        id     INTEGER PRIMARY KEY REFERENCES answer ON DELETE CASCADE,
        answer BLOB NOT NULL  -- the completion as JSON, compressed with zlib
    ) STRICT;

    CREATE TABLE answer_question (  -- of those answers that may be found by meaning
        id        INTEGER PRIMARY KEY REFERENCES answer ON DELETE CASCADE,
        partition BLOB NOT NULL CHECK (length(partition) = 16),
        question  TEXT NOT NULL,
        vector    BLOB,  -- float16, little-endian
        embedder  TEXT  -- that made the vector
    ) STRICT;

    CREATE TABLE answer_ids (unused INTEGER NOT NULL) STRICT;  -- every id below it is given out, or set aside for a process
    INSERT INTO answer_ids VALUES (1);
    """,
)
