-- The database as version 0.5.0 wrote it.
PRAGMA user_version=2;
BEGIN TRANSACTION;
CREATE TABLE accounts_version (version INTEGER NOT NULL) STRICT;
INSERT INTO "accounts_version" VALUES(4);
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
CREATE TABLE organisation (
        id         TEXT PRIMARY KEY,
        name       TEXT NOT NULL,
        created_at REAL NOT NULL,  -- Unix seconds, as all times here
        version    INTEGER NOT NULL  -- that of its last change
    ) STRICT, WITHOUT ROWID;
INSERT INTO "organisation" VALUES('acme','Acme',1790000001.0,2);
INSERT INTO "organisation" VALUES('local','Local',1795291648.0,1);
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
INSERT INTO "team" VALUES('alpha','acme','Team Alpha','["gpt-*"]',600,NULL,4,0,1790000002.0,3);
INSERT INTO "team" VALUES('local','local','Local','["*"]',NULL,NULL,NULL,0,1795291648.0,1);
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
INSERT INTO "virtual_key" VALUES('sk-hw-W1TySdL7','alpha','ci',X'95988473AAA623201FC4E1CFBEA5858A4D39D43597C3C75C93DE251A6E7760B9','f9ac78efa223b742','["*"]',NULL,NULL,NULL,0,NULL,NULL,1790000003.0,4);
CREATE INDEX virtual_key_version ON virtual_key (version);
COMMIT;
