-- The database as version 0.4.0 wrote it.
PRAGMA user_version=1;
BEGIN TRANSACTION;
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
INSERT INTO "capability" VALUES('openai','gpt-4o','3f2a9c51','streams',1,'the answer was a stream',1790000000.5);
COMMIT;
