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
    # What teams and keys may spend, and how a team's calls become credits.
    """
    ALTER TABLE team ADD COLUMN budget_day_microusd INTEGER;  -- NULL is no limit, as in all of these
    ALTER TABLE team ADD COLUMN budget_month_microusd INTEGER;
    ALTER TABLE team ADD COLUMN budget_total_microusd INTEGER;
    ALTER TABLE team ADD COLUMN budget_mode TEXT;  -- NULL: it needs no credits
    ALTER TABLE team ADD COLUMN microcredits_per_dollar INTEGER NOT NULL DEFAULT 10000000;
    ALTER TABLE team ADD COLUMN tokens_per_credit INTEGER NOT NULL DEFAULT 10000;
    ALTER TABLE team ADD COLUMN rounds_up INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE team ADD COLUMN markup INTEGER;  -- ten-thousandths of a percent, NULL: as the prices say
    ALTER TABLE team ADD COLUMN stops_when_spent INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE virtual_key ADD COLUMN budget_day_microusd INTEGER;
    ALTER TABLE virtual_key ADD COLUMN budget_month_microusd INTEGER;
    ALTER TABLE virtual_key ADD COLUMN budget_total_microusd INTEGER;
    """,
    # The ledger. Times are Unix seconds, money is in millionths of a US dollar, credits in millionths of a credit.
    """
    CREATE TABLE process (  -- that has, or had when it died, calls under way
        number     INTEGER PRIMARY KEY AUTOINCREMENT,
        token      TEXT NOT NULL UNIQUE,  -- in the name of the file it keeps locked while it lives
        started_at REAL NOT NULL,
        closed     TEXT NOT NULL DEFAULT '[]'  -- the numbers of the calls noted in that file that were closed last
    ) STRICT;

    -- A call's row moves from the first of these two into the second when it closes, for a row that grows has to be put
    -- elsewhere, and what is only ever added to is cheap.
    CREATE TABLE open_call (
        process   INTEGER NOT NULL,  -- that is to close it
        number    INTEGER NOT NULL,  -- each process counts its own
        id        TEXT NOT NULL,
        team      TEXT NOT NULL,
        model     TEXT NOT NULL,
        opened_at REAL NOT NULL,
        key       TEXT,
        user      TEXT NOT NULL,
        job       TEXT,
        purpose   TEXT NOT NULL,
        held_microcredits INTEGER NOT NULL CHECK (held_microcredits >= 0),
        held_microusd INTEGER NOT NULL CHECK (held_microusd >= 0),
        PRIMARY KEY (process, number)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE call (
        number            INTEGER PRIMARY KEY,
        id                TEXT NOT NULL,  -- a client may have chosen it, so it need not be the only one
        team              TEXT NOT NULL,
        key               TEXT,
        user              TEXT NOT NULL,
        job               TEXT,  -- NULL: the call was a job of its own
        purpose           TEXT NOT NULL,
        model             TEXT NOT NULL,  -- as it was asked for
        opened_at         REAL NOT NULL,
        status            TEXT NOT NULL,
        mode              TEXT NOT NULL,
        http_status       INTEGER NOT NULL,
        error             TEXT,
        target            TEXT,
        answered_model    TEXT,
        attempts          INTEGER NOT NULL,
        prompt_tokens     INTEGER,
        completion_tokens INTEGER,
        cached_tokens     INTEGER,
        reasoning_tokens  INTEGER,
        is_estimated      INTEGER NOT NULL,
        cost_microusd     INTEGER,  -- what the upstream asks for it, NULL: unknown
        price_microusd    INTEGER,  -- what the team is asked for it, NULL: unknown
        settled_microcredits   INTEGER NOT NULL,  -- charged, or left with its job to be charged
        overdraft_microcredits INTEGER NOT NULL,  -- what it was worth beyond the credit that was left
        ttft_ms           REAL,
        duration_ms       REAL NOT NULL,
        cache_entry       INTEGER,
        finish_reason     TEXT,
        closed_at         REAL NOT NULL
    ) STRICT;

    CREATE INDEX call_of_team ON call (team);
    CREATE INDEX call_of_key ON call (key) WHERE key IS NOT NULL;
    CREATE INDEX call_of_job ON call (job) WHERE job IS NOT NULL;

    CREATE TABLE call_day (  -- the sums of closed calls, which stay when the calls are deleted
        day               INTEGER NOT NULL,  -- days since 1970-01-01, UTC, of the opening
        team              TEXT NOT NULL,
        key               TEXT NOT NULL,  -- '' where there is none, as with the target
        model             TEXT NOT NULL,
        target            TEXT NOT NULL,
        purpose           TEXT NOT NULL,
        status            TEXT NOT NULL,
        calls             INTEGER NOT NULL,
        failed_calls      INTEGER NOT NULL,  -- those of them that are not `ok`
        unpriced_calls    INTEGER NOT NULL,  -- those of them whose price is unknown
        attempts          INTEGER NOT NULL,
        prompt_tokens     INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        cached_tokens     INTEGER NOT NULL,
        reasoning_tokens  INTEGER NOT NULL,
        cost_microusd     INTEGER NOT NULL,
        price_microusd    INTEGER NOT NULL,
        settled_microcredits INTEGER NOT NULL,
        PRIMARY KEY (day, team, key, model, target, purpose, status)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE user_day (  -- the same by user too, of calls that name one: there may be as many of these as calls
        day               INTEGER NOT NULL,
        team              TEXT NOT NULL,
        key               TEXT NOT NULL,
        model             TEXT NOT NULL,
        target            TEXT NOT NULL,
        user              TEXT NOT NULL,
        purpose           TEXT NOT NULL,
        status            TEXT NOT NULL,
        calls             INTEGER NOT NULL,
        failed_calls      INTEGER NOT NULL,
        unpriced_calls    INTEGER NOT NULL,
        attempts          INTEGER NOT NULL,
        prompt_tokens     INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        cached_tokens     INTEGER NOT NULL,
        reasoning_tokens  INTEGER NOT NULL,
        cost_microusd     INTEGER NOT NULL,
        price_microusd    INTEGER NOT NULL,
        settled_microcredits INTEGER NOT NULL,
        PRIMARY KEY (day, team, key, model, target, user, purpose, status)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE spending (  -- of those that ever had a budget, made from the two tables of calls and kept with them
        holder   TEXT NOT NULL,  -- 'team ' or 'key ' with an id behind it
        period   TEXT NOT NULL,
        start    INTEGER NOT NULL,  -- of the day or the month, 0 for the total
        reserved INTEGER NOT NULL CHECK (reserved >= 0),  -- micro-dollars, as the next: what the span's open calls hold
        spent    INTEGER NOT NULL CHECK (spent >= 0),  -- what its closed calls cost
        PRIMARY KEY (holder, period, start)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE team_day (  -- what is counted for teams beside their calls
        team    TEXT NOT NULL,
        day     INTEGER NOT NULL,
        counted TEXT NOT NULL,  -- a state of jobs that were created on that day, or a kind of credit_transaction
        amount  INTEGER NOT NULL,  -- jobs, or micro-credits
        PRIMARY KEY (team, day, counted)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE credit_account (
        team      TEXT PRIMARY KEY,
        allocated INTEGER NOT NULL,  -- micro-credits, as the next three
        remaining INTEGER NOT NULL CHECK (remaining >= 0),
        reserved  INTEGER NOT NULL CHECK (reserved >= 0),  -- the sum of what its calls and jobs hold
        charged   INTEGER NOT NULL CHECK (charged >= 0),
        transactions INTEGER NOT NULL CHECK (transactions >= 0),
        refill_microcredits INTEGER CHECK (refill_microcredits > 0),  -- NULL: it is not refilled
        refill_period TEXT,
        refill_at REAL,
        refill_from REAL,  -- the first refill_at
        CHECK (allocated = remaining + reserved + charged),
        CHECK ((refill_microcredits IS NULL) = (refill_at IS NULL)),
        CHECK ((refill_microcredits IS NULL) = (refill_period IS NULL))
    ) STRICT, WITHOUT ROWID;

    CREATE INDEX credit_account_to_refill ON credit_account (refill_at) WHERE refill_at IS NOT NULL;

    -- Each change of a balance, which is what remains or is reserved. Reserving leaves the balance as it is, and stands in
    -- the row of the call or job that it is for.
    CREATE TABLE credit_transaction (
        team   TEXT NOT NULL,
        number INTEGER NOT NULL CHECK (number > 0),  -- each team counts its own
        kind   TEXT NOT NULL,
        amount INTEGER NOT NULL,  -- micro-credits, as the next two
        before INTEGER NOT NULL CHECK (before >= 0),
        after  INTEGER NOT NULL CHECK (after >= 0),
        job    TEXT,
        call   TEXT,
        reason TEXT NOT NULL,
        at     REAL NOT NULL,
        PRIMARY KEY (team, number),
        CHECK (after = before + amount)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE job (
        number            INTEGER PRIMARY KEY,
        id                TEXT NOT NULL UNIQUE,
        team              TEXT NOT NULL,
        key               TEXT,
        user              TEXT NOT NULL,
        type              TEXT NOT NULL,
        state             TEXT NOT NULL,
        metadata          TEXT NOT NULL CHECK (json_valid(metadata)),
        error             TEXT,
        created_at        REAL NOT NULL,
        started_at        REAL,  -- of its first call
        ended_at          REAL,
        held_microcredits INTEGER NOT NULL CHECK (held_microcredits >= 0),  -- 0 once it has ended
        charged_microcredits   INTEGER NOT NULL DEFAULT 0,
        overdraft_microcredits INTEGER NOT NULL DEFAULT 0,
        calls             INTEGER NOT NULL DEFAULT 0,  -- sums of its closed calls
        failed_calls      INTEGER NOT NULL DEFAULT 0,
        unpriced_calls    INTEGER NOT NULL DEFAULT 0,
        attempts          INTEGER NOT NULL DEFAULT 0,
        prompt_tokens     INTEGER NOT NULL DEFAULT 0,
        completion_tokens INTEGER NOT NULL DEFAULT 0,
        cached_tokens     INTEGER NOT NULL DEFAULT 0,
        reasoning_tokens  INTEGER NOT NULL DEFAULT 0,
        cost_microusd     INTEGER NOT NULL DEFAULT 0,
        price_microusd    INTEGER NOT NULL DEFAULT 0,
        CHECK ((ended_at IS NULL) = (state IN ('pending', 'in_progress'))),
        CHECK (ended_at IS NULL OR held_microcredits = 0)
    ) STRICT;

    CREATE INDEX job_of_team ON job (team);
    CREATE INDEX job_open ON job (created_at) WHERE ended_at IS NULL;
    """,
    # What administrators ask for twice is done once.
    """
    CREATE TABLE payment (  -- that was asked for under a key of the client's
        key      TEXT PRIMARY KEY,
        asked    TEXT NOT NULL CHECK (json_valid(asked)),
        answered TEXT NOT NULL CHECK (json_valid(answered))
    ) STRICT, WITHOUT ROWID;
    """,
    # Names for models that are made while the proxy runs. Their changes are counted in accounts_version too.
    """
    CREATE TABLE model_group (
        id          TEXT PRIMARY KEY,  -- the name that is asked for
        targets     TEXT NOT NULL CHECK (json_valid(targets)),  -- an array, in the order in which they are asked
        delivery    TEXT NOT NULL,
        recovery    TEXT,  -- NULL is as the config says for all, as in the three below
        coalesce    INTEGER,
        cache       TEXT,
        cache_ttl_s REAL,
        teams       TEXT CHECK (teams IS NULL OR json_valid(teams)),  -- an array of ids, NULL is all of them
        is_active   INTEGER NOT NULL,
        created_at  REAL NOT NULL,  -- Unix seconds
        version     INTEGER NOT NULL  -- that of its last change
    ) STRICT, WITHOUT ROWID;
    """,
    # Prompts and answers of calls, or their hashes, where they are to be stored.
    """
    CREATE TABLE content_key (  -- what is known of the keys that contents are sealed with, or were
        version     INTEGER PRIMARY KEY,
        check_value BLOB NOT NULL  -- by which the key is known again
    ) STRICT;

    CREATE TABLE call_content (
        call         INTEGER PRIMARY KEY REFERENCES call ON DELETE CASCADE,
        form         TEXT NOT NULL,  -- full (compressed with zlib), or hash (BLAKE2b with 32 bytes)
        key_version  INTEGER,  -- of the key that the two texts are sealed with, NULL: of none
        prompt       BLOB NOT NULL,
        prompt_bytes INTEGER NOT NULL,  -- of the whole prompt, of which only the beginning may be stored
        answer       BLOB,  -- NULL: nothing was said
        answer_bytes INTEGER
    ) STRICT;

    CREATE INDEX content_of_key ON call_content (key_version);
    """,
    # A job that was created for one call ends with it, also when that call's process dies: this is its number.
    "ALTER TABLE job ADD COLUMN process INTEGER;",
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
