"""The schema, as the steps that led to it. A step that was released is never changed: add another behind it.

`PRAGMA user_version` counts the steps a file has had.
"""

STEPS: tuple[str, ...] = (
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
)
