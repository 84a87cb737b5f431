-- The whole schema of the contract for SQLite.
--
-- Timestamps are ISO 8601 text in UTC with milliseconds and Z (2026-11-22T16:41:07.123Z), so that they sort and read
-- well. Ids ascend in commit order and are never used again (AUTOINCREMENT). Only syntax that SQLite 3.37 knows is used,
-- so that the sqlite3 of an older distribution can still open the file. The full-text index is not part of it: the
-- server makes and drops it as `archive.full_text` says.
--
-- Texts hold what came, control characters included, but for NUL, which stands as U+2400 (SYMBOL FOR NULL), and what is
-- no character in its charset, which stands as U+FFFD.
--
-- Columns that the contract does not name carry the service's own bookkeeping; they are marked "own".

-- ------------------------------------------------------------------------------------------------ accounts

CREATE TABLE accounts (
    id             INTEGER PRIMARY KEY AUTOINCREMENT,
    sip_uri        TEXT    NOT NULL UNIQUE
                   CHECK (sip_uri = lower(sip_uri) AND (sip_uri LIKE 'sip:%@%' OR sip_uri LIKE 'sips:%@%')),
    username       TEXT    NOT NULL,
    auth           TEXT    NOT NULL DEFAULT 'password' CHECK (auth IN ('password', 'ntlm', 'kerberos', 'aad')),
    secret_sealed  BLOB,
    secret_ref     TEXT,
    display_name   TEXT,
    enabled        INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)),
    invitations    TEXT    CHECK (invitations IN ('accept', 'decline', 'ignore')),
    retention_days INTEGER CHECK (retention_days >= 0),
    created_at     TEXT    NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    updated_at     TEXT    NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    endpoint_id    TEXT,                                    -- own: the lasting UCWA endpointId
    removed_at     TEXT                                     -- own: taken out of service; the archive keeps its URI
) STRICT;

-- A change by hand moves updated_at forward too, because a running server looks for that.
CREATE TRIGGER accounts_touch
    AFTER UPDATE OF sip_uri, username, auth, secret_sealed, secret_ref, enabled, invitations, retention_days, removed_at
    ON accounts WHEN NEW.updated_at IS OLD.updated_at
BEGIN
    UPDATE accounts SET updated_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now') WHERE id = NEW.id;
END;

CREATE TABLE account_status (
    account_id    INTEGER PRIMARY KEY REFERENCES accounts (id),
    state         TEXT    NOT NULL CHECK (state IN ('starting', 'discovering', 'signing_in', 'online', 'stalled',
                                                   'backing_off', 'needs_attention', 'stopped')),
    detail        TEXT,
    since         TEXT    NOT NULL,
    node_id       TEXT,
    last_event_at TEXT,
    restarts      INTEGER NOT NULL DEFAULT 0
) STRICT;

CREATE TABLE nodes (
    node_id      TEXT PRIMARY KEY,
    version      TEXT NOT NULL,
    started_at   TEXT NOT NULL,
    heartbeat_at TEXT NOT NULL,
    stopped_at   TEXT
) STRICT;

CREATE TABLE account_leases (
    account_id INTEGER PRIMARY KEY REFERENCES accounts (id),
    node_id    TEXT    NOT NULL,
    epoch      INTEGER NOT NULL,
    expires_at TEXT    NOT NULL
) STRICT;

-- ------------------------------------------------------------------------------------------------ archive

CREATE TABLE sessions (
    id               INTEGER PRIMARY KEY AUTOINCREMENT,
    account_id       INTEGER NOT NULL REFERENCES accounts (id),
    application_href TEXT    NOT NULL,
    endpoint_id      TEXT    NOT NULL,
    event_cursor     TEXT,
    started_at       TEXT    NOT NULL,
    last_ack_at      TEXT,
    ended_at         TEXT,
    end_reason       TEXT,
    backfilled_until TEXT
) STRICT;
CREATE INDEX sessions_of_account ON sessions (account_id, id);
CREATE UNIQUE INDEX sessions_one_open ON sessions (account_id) WHERE ended_at IS NULL;

CREATE TABLE gaps (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    account_id  INTEGER NOT NULL REFERENCES accounts (id),
    session_id  INTEGER,
    from_at     TEXT    NOT NULL,
    to_at       TEXT    NOT NULL,
    reason      TEXT    NOT NULL,
    backfilled  INTEGER NOT NULL DEFAULT 0 CHECK (backfilled IN (0, 1)),
    recorded_at TEXT    NOT NULL,
    detail      TEXT                                       -- why it can't be backfilled
) STRICT;
CREATE INDEX gaps_of_account ON gaps (account_id, from_at);

-- Own: when conversation logs are to be read, for a gap or for a hint of the server's; several times, since logs lag.
CREATE TABLE backfills (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    account_id INTEGER NOT NULL REFERENCES accounts (id),
    gap_id     INTEGER UNIQUE REFERENCES gaps (id),
    from_at    TEXT    NOT NULL,
    due_at     TEXT    NOT NULL,
    first_at   TEXT,
    runs       INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX backfills_due ON backfills (account_id, due_at);
CREATE UNIQUE INDEX backfills_one_hint ON backfills (account_id) WHERE gap_id IS NULL;

CREATE TABLE conversations (
    id                 INTEGER PRIMARY KEY AUTOINCREMENT,
    account_id         INTEGER NOT NULL REFERENCES accounts (id),
    session_id         INTEGER REFERENCES sessions (id),
    href               TEXT,
    thread_id          TEXT,
    subject            TEXT,
    importance         TEXT,
    direction          TEXT    CHECK (direction IN ('incoming', 'outgoing')),
    state              TEXT,
    multiparty         INTEGER NOT NULL DEFAULT 0 CHECK (multiparty IN (0, 1)),
    online_meeting_uri TEXT,
    started_at         TEXT    NOT NULL,
    connected_at       TEXT,
    ended_at           TEXT,
    end_code           TEXT,
    end_subcode        TEXT,
    awaiting           TEXT    CHECK (awaiting IN ('fetch')),   -- own: only a link came
    first_message_href TEXT,                                    -- own: first incoming message event, for the invitation's text
    continued_in       INTEGER REFERENCES conversations (id) DEFERRABLE INITIALLY DEFERRED,  -- derived conversation: where the talk went on
    purged_at          TEXT
) STRICT;
CREATE UNIQUE INDEX conversations_href ON conversations (account_id, session_id, href);
CREATE INDEX conversations_open ON conversations (account_id, session_id) WHERE ended_at IS NULL;
CREATE INDEX conversations_thread ON conversations (account_id, thread_id) WHERE thread_id IS NOT NULL;
-- What retention has still to look at.
CREATE INDEX conversations_kept ON conversations (account_id, ended_at) WHERE purged_at IS NULL;

CREATE TABLE participants (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    account_id      INTEGER NOT NULL REFERENCES accounts (id),
    conversation_id INTEGER NOT NULL REFERENCES conversations (id),
    session_id      INTEGER REFERENCES sessions (id),           -- own: scope of href
    href            TEXT,
    sip_uri         TEXT,
    display_name    TEXT,
    role            TEXT,
    source_network  TEXT,
    is_local        INTEGER NOT NULL DEFAULT 0 CHECK (is_local IN (0, 1)),
    joined_at       TEXT,
    left_at         TEXT,
    awaiting        TEXT    CHECK (awaiting IN ('fetch'))       -- own
) STRICT;
CREATE INDEX participants_of_conversation ON participants (account_id, conversation_id);
CREATE INDEX participants_href ON participants (account_id, session_id, href);
CREATE UNIQUE INDEX participants_one_open_stay ON participants (account_id, session_id, href)
    WHERE left_at IS NULL AND href IS NOT NULL;
CREATE INDEX participants_uri ON participants (sip_uri, account_id, conversation_id);

-- Who began to type when, if archive.typing is on.
CREATE TABLE typing (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    account_id      INTEGER NOT NULL REFERENCES accounts (id),
    conversation_id INTEGER NOT NULL REFERENCES conversations (id),
    participant_id  INTEGER NOT NULL REFERENCES participants (id),
    at              TEXT    NOT NULL
) STRICT;
CREATE INDEX typing_of_conversation ON typing (account_id, conversation_id, at);

CREATE TABLE messages (
    id                INTEGER PRIMARY KEY AUTOINCREMENT,
    account_id        INTEGER NOT NULL REFERENCES accounts (id),
    conversation_id   INTEGER NOT NULL REFERENCES conversations (id),
    session_id        INTEGER REFERENCES sessions (id),         -- own: scope of href
    direction         TEXT    NOT NULL CHECK (direction IN ('incoming', 'outgoing')),
    sender_uri        TEXT,
    sender_name       TEXT,
    content_type      TEXT    NOT NULL DEFAULT 'text/plain',
    body              TEXT    NOT NULL,
    body_html         TEXT,
    sent_at           TEXT    NOT NULL,
    archived_at       TEXT    NOT NULL,
    status            TEXT    NOT NULL CHECK (status IN ('pending', 'delivered', 'failed')),
    code              TEXT,
    subcode           TEXT,
    reason            TEXT,
    failed_recipients TEXT,
    operation_id      TEXT,
    outbox_id         INTEGER,
    correlation       TEXT,
    source            TEXT    NOT NULL CHECK (source IN ('invitation', 'event', 'conversation_log')),
    href              TEXT,
    chain_seq         INTEGER,
    content_hash      TEXT,
    chain_hash        TEXT,
    purged_at         TEXT,
    tombstone         TEXT,                                     -- own: what a purge signed instead of the text
    awaiting          TEXT    CHECK (awaiting IN ('fetch', 'sender', 'copy', 'receipt')),  -- own: why not chained yet
    sender_href       TEXT,                                                                -- own: sender's participant
    CHECK (chain_seq IS NULL OR (awaiting IS NULL AND content_hash IS NOT NULL AND chain_hash IS NOT NULL))
) STRICT;
CREATE UNIQUE INDEX messages_href ON messages (account_id, session_id, href) WHERE href IS NOT NULL;
CREATE UNIQUE INDEX messages_chain ON messages (account_id, chain_seq);
CREATE INDEX messages_sent ON messages (account_id, sent_at);
CREATE INDEX messages_sent_by_all ON messages (sent_at, id);
CREATE INDEX messages_sender ON messages (sender_uri, account_id);
CREATE INDEX messages_of_conversation ON messages (account_id, conversation_id, sent_at);
CREATE INDEX messages_operation ON messages (account_id, operation_id) WHERE operation_id IS NOT NULL;
CREATE INDEX messages_outbox ON messages (outbox_id) WHERE outbox_id IS NOT NULL;
CREATE INDEX messages_open ON messages (account_id, conversation_id)
    WHERE awaiting IS NOT NULL OR (href IS NULL AND source <> 'event');
CREATE INDEX messages_awaiting ON messages (awaiting, archived_at) WHERE awaiting IS NOT NULL;
-- What retention has still to look at.
CREATE INDEX messages_kept ON messages (account_id, sent_at) WHERE purged_at IS NULL;

CREATE TABLE invitations (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    account_id      INTEGER NOT NULL REFERENCES accounts (id),
    conversation_id INTEGER REFERENCES conversations (id),
    session_id      INTEGER REFERENCES sessions (id),           -- own: scope of href
    href            TEXT,
    kind            TEXT    NOT NULL CHECK (kind IN ('messaging', 'online_meeting', 'participant')),
    direction       TEXT    CHECK (direction IN ('incoming', 'outgoing')),
    state           TEXT,
    operation_id    TEXT,
    thread_id       TEXT,
    subject         TEXT,
    importance      TEXT,
    from_uri        TEXT,
    from_name       TEXT,
    to_uri          TEXT,
    message_id      INTEGER REFERENCES messages (id) DEFERRABLE INITIALLY DEFERRED,
    action          TEXT    CHECK (action IN ('accepted', 'declined', 'ignored')),
    started_at      TEXT    NOT NULL,
    finished_at     TEXT,
    code            TEXT,
    subcode         TEXT,
    reason          TEXT,
    awaiting        TEXT    CHECK (awaiting IN ('fetch'))       -- own
) STRICT;
CREATE UNIQUE INDEX invitations_href ON invitations (account_id, session_id, href) WHERE href IS NOT NULL;
CREATE INDEX invitations_to ON invitations (to_uri, account_id, conversation_id);
CREATE INDEX invitations_of_conversation ON invitations (account_id, conversation_id);
CREATE INDEX invitations_operation ON invitations (account_id, operation_id) WHERE operation_id IS NOT NULL;
CREATE INDEX invitations_awaiting ON invitations (account_id, session_id) WHERE awaiting IS NOT NULL;
CREATE INDEX invitations_message ON invitations (message_id) WHERE message_id IS NOT NULL;

-- Head of each account's hash chain, kept apart from the messages so that missing newest ones are noticed.
CREATE TABLE chain_heads (
    account_id INTEGER PRIMARY KEY REFERENCES accounts (id),
    seq        INTEGER NOT NULL,
    hash       TEXT    NOT NULL
) STRICT;

CREATE TABLE event_quarantine (
    id             INTEGER PRIMARY KEY AUTOINCREMENT,
    account_id     INTEGER NOT NULL REFERENCES accounts (id),
    session_id     INTEGER REFERENCES sessions (id),
    received_at    TEXT    NOT NULL,
    reason         TEXT    NOT NULL,
    payload        TEXT    NOT NULL,
    resolved_at    TEXT,
    cursor         TEXT,                                        -- own: these three tell a redelivered payload
    payload_sha256 TEXT    NOT NULL,
    occurrence     INTEGER NOT NULL DEFAULT 0,
    sender         TEXT,                                        -- own: whose event the payload is, as JSON
    purged_at      TEXT
) STRICT;
CREATE UNIQUE INDEX event_quarantine_once ON event_quarantine (account_id, session_id, cursor, payload_sha256, occurrence)
    WHERE cursor IS NOT NULL;
CREATE INDEX event_quarantine_open ON event_quarantine (account_id, id) WHERE resolved_at IS NULL;

CREATE TABLE holds (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    account_id  INTEGER REFERENCES accounts (id),
    with_uri    TEXT    CHECK (with_uri = lower(with_uri) AND (with_uri LIKE 'sip:%@%' OR with_uri LIKE 'sips:%@%')),
    reason      TEXT    NOT NULL,
    created_by  TEXT    NOT NULL,
    created_at  TEXT    NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    released_at TEXT,
    released_by TEXT                                            -- own
) STRICT;

-- Who removed what, when. The one that has not finished is under way, or was interrupted; whoever does it says so here
-- in each of its transactions.
CREATE TABLE retention_runs (
    id            INTEGER PRIMARY KEY AUTOINCREMENT,
    started_by    TEXT    NOT NULL,
    node          TEXT    NOT NULL,
    public_key    TEXT    NOT NULL,
    started_at    TEXT    NOT NULL,
    heartbeat_at  TEXT    NOT NULL,
    finished_at   TEXT,
    outcome       TEXT    CHECK (outcome IN ('done', 'stopped', 'failed', 'interrupted')),
    messages      INTEGER NOT NULL DEFAULT 0,
    conversations INTEGER NOT NULL DEFAULT 0,
    payloads      INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE UNIQUE INDEX retention_runs_one_at_a_time ON retention_runs ((finished_at IS NULL)) WHERE finished_at IS NULL;

CREATE TABLE access_log (
    id      INTEGER PRIMARY KEY AUTOINCREMENT,
    at      TEXT    NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    actor   TEXT    NOT NULL,
    action  TEXT    NOT NULL,
    account TEXT,
    query   TEXT    NOT NULL
) STRICT;

-- ------------------------------------------------------------------------------------------------ outbox

CREATE TABLE outbox (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    account         TEXT    NOT NULL,
    recipients      TEXT,
    body            TEXT    NOT NULL DEFAULT '',
    content_type    TEXT    NOT NULL DEFAULT 'text/plain',
    subject         TEXT,
    importance      TEXT    NOT NULL DEFAULT 'Normal',
    conversation_id INTEGER,
    thread_id       TEXT,
    priority        INTEGER NOT NULL DEFAULT 100,
    send_after      TEXT,
    expires_at      TEXT,
    max_attempts    INTEGER CHECK (max_attempts >= 1),
    idempotency_key TEXT,
    correlation     TEXT,
    state           TEXT    NOT NULL DEFAULT 'queued'
                    CHECK (state IN ('queued', 'held', 'sending', 'sent', 'delivered', 'failed', 'expired',
                                     'cancelled', 'uncertain')),
    attempts        INTEGER NOT NULL DEFAULT 0,
    next_attempt_at TEXT,
    operation_id    TEXT,
    message_id      INTEGER,
    last_code       TEXT,
    last_subcode    TEXT,
    last_error      TEXT,
    claimed_by      TEXT,
    claimed_at      TEXT,
    created_at      TEXT    NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    sent_at         TEXT,
    finished_at     TEXT,
    updated_at      TEXT    NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    account_id      INTEGER,                     -- own: set when the service has looked at the row ("admitted")
    destination     TEXT,                        -- own: rows with the same one leave in order; NULL: not admitted yet
    given_conversation_id INTEGER,               -- own: conversation_id as the user gave it
    possible_duplicate INTEGER NOT NULL DEFAULT 0 CHECK (possible_duplicate IN (0, 1)),   -- sent again though the server may have taken it before
    revision        INTEGER NOT NULL DEFAULT 0 CHECK (revision BETWEEN 0 AND 4611686018427387903)   -- own: every change by the service raises it, so triggers know users
) STRICT;

-- One expression for an account however a user spells it; the idempotency key is unique per account.
CREATE UNIQUE INDEX outbox_idempotency ON outbox (
    CASE WHEN substr(lower(trim(account)), 1, 4) = 'sip:' THEN substr(lower(trim(account)), 5) ELSE lower(trim(account)) END,
    idempotency_key
) WHERE idempotency_key IS NOT NULL;

-- What the queue looks for is in partial indexes, so that finished rows cost nothing.
CREATE INDEX outbox_new ON outbox (account, id) WHERE state = 'queued' AND destination IS NULL;
CREATE INDEX outbox_queued ON outbox (account_id, destination, priority, id) WHERE state = 'queued' AND destination IS NOT NULL;
CREATE INDEX outbox_sending ON outbox (account_id, destination) WHERE state = 'sending';
CREATE INDEX outbox_unplaced ON outbox (account_id, operation_id) WHERE state = 'sent' AND message_id IS NULL;
CREATE INDEX outbox_expiring ON outbox (expires_at) WHERE state = 'queued' AND expires_at IS NOT NULL;
CREATE INDEX outbox_next_attempt ON outbox (next_attempt_at) WHERE state = 'queued' AND next_attempt_at IS NOT NULL;
CREATE INDEX outbox_send_after ON outbox (send_after) WHERE state = 'queued' AND send_after IS NOT NULL;
CREATE INDEX outbox_by_state ON outbox (state, account);
-- Rows of which a conversation log may tell that the server took them.
CREATE INDEX outbox_in_doubt ON outbox (account_id) WHERE state = 'uncertain' OR possible_duplicate = 1;
-- Rows that will be pruned. An uncertain one is not: somebody has to decide.
CREATE INDEX outbox_finished ON outbox (coalesce(finished_at, sent_at))
    WHERE state IN ('sent', 'delivered', 'failed', 'expired', 'cancelled');

CREATE TABLE outbox_attempts (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    outbox_id    INTEGER NOT NULL REFERENCES outbox (id) ON DELETE CASCADE,
    attempt      INTEGER NOT NULL,
    node         TEXT,
    started_at   TEXT    NOT NULL,
    finished_at  TEXT,
    outcome      TEXT,
    http_status  INTEGER,
    code         TEXT,
    subcode      TEXT,
    detail       TEXT,
    operation_id TEXT    NOT NULL                -- own: a late event about an older attempt still finds its row
) STRICT;
CREATE INDEX outbox_attempts_of_row ON outbox_attempts (outbox_id, id);
CREATE UNIQUE INDEX outbox_attempts_operation ON outbox_attempts (operation_id);

CREATE TRIGGER outbox_insert BEFORE INSERT ON outbox WHEN NEW.state NOT IN ('queued', 'held')
BEGIN
    SELECT RAISE(ABORT, 'a new row of outbox starts as queued or held');
END;

-- A user may withdraw, hold and queue again; the service is known by its raising the revision.
CREATE TRIGGER outbox_user_cancel BEFORE UPDATE OF state ON outbox
    WHEN NEW.revision = OLD.revision AND NEW.state = 'cancelled' AND OLD.state NOT IN ('queued', 'held', 'cancelled')
BEGIN
    SELECT RAISE(ABORT, 'only a queued or held row of outbox can be cancelled; this one is under way or finished');
END;
CREATE TRIGGER outbox_user_hold BEFORE UPDATE OF state ON outbox
    WHEN NEW.revision = OLD.revision AND NEW.state = 'held' AND OLD.state NOT IN ('queued', 'held')
BEGIN
    SELECT RAISE(ABORT, 'only a queued row of outbox can be held; this one is under way or finished');
END;
CREATE TRIGGER outbox_user_queue BEFORE UPDATE OF state ON outbox
    WHEN NEW.revision = OLD.revision AND NEW.state = 'queued'
         AND OLD.state NOT IN ('queued', 'held', 'failed', 'expired', 'uncertain')
BEGIN
    SELECT RAISE(ABORT, 'only a held, failed, expired or uncertain row of outbox can be queued again');
END;
CREATE TRIGGER outbox_user_other BEFORE UPDATE OF state ON outbox
    WHEN NEW.revision = OLD.revision AND NEW.state <> OLD.state AND NEW.state NOT IN ('queued', 'held', 'cancelled')
BEGIN
    SELECT RAISE(ABORT, 'this state of outbox is set by the service; set queued, held or cancelled');
END;

CREATE TRIGGER outbox_user_cancelled AFTER UPDATE OF state ON outbox
    WHEN NEW.revision = OLD.revision AND NEW.state = 'cancelled' AND OLD.state <> 'cancelled'
BEGIN
    UPDATE outbox SET finished_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), next_attempt_at = NULL,
                      updated_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now')
     WHERE id = NEW.id;
END;

-- Queued again: from the start, with a fresh look at what the user may have corrected.
CREATE TRIGGER outbox_user_queued AFTER UPDATE OF state ON outbox
    WHEN NEW.revision = OLD.revision AND NEW.state = 'queued' AND OLD.state <> 'queued'
BEGIN
    UPDATE outbox
       SET attempts = 0, next_attempt_at = NULL, finished_at = NULL, sent_at = NULL, claimed_by = NULL, claimed_at = NULL,
           last_code = NULL, last_subcode = NULL, last_error = NULL, message_id = NULL, destination = NULL,
           possible_duplicate = CASE WHEN OLD.state = 'uncertain' OR OLD.sent_at IS NOT NULL THEN 1
                                     ELSE OLD.possible_duplicate END,
           conversation_id = CASE WHEN NEW.conversation_id IS OLD.conversation_id AND OLD.account_id IS NOT NULL
                                  THEN OLD.given_conversation_id ELSE NEW.conversation_id END,
           expires_at = CASE WHEN OLD.state = 'expired' AND NEW.expires_at IS OLD.expires_at
                             THEN NULL ELSE NEW.expires_at END,
           updated_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now')
     WHERE id = NEW.id;
END;

-- A queued row that a user corrects is looked at again.
CREATE TRIGGER outbox_user_edit
    AFTER UPDATE OF account, recipients, body, content_type, subject, importance, conversation_id, thread_id,
                    send_after, expires_at ON outbox
    WHEN NEW.revision = OLD.revision AND NEW.state = 'queued' AND OLD.state = 'queued' AND NEW.destination IS NOT NULL
BEGIN
    UPDATE outbox SET destination = NULL, updated_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now') WHERE id = NEW.id;
END;

CREATE TRIGGER outbox_touch AFTER UPDATE ON outbox
    WHEN NEW.revision = OLD.revision AND NEW.updated_at IS OLD.updated_at
BEGIN
    UPDATE outbox SET updated_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now') WHERE id = NEW.id;
END;

-- ------------------------------------------------------------------------------------------------ views
--
-- Indexes are named where the planner, without statistics, would walk through all of an account's people instead.

CREATE VIEW message_history AS
SELECT m.id AS message_id,
       a.sip_uri AS account,
       m.sent_at,
       m.direction,
       m.sender_uri AS sender,
       m.sender_name,
       CASE m.direction
       WHEN 'incoming' THEN
           (SELECT group_concat(uri, ';') FROM (
               SELECT a.sip_uri AS uri WHERE a.sip_uri IS NOT m.sender_uri
               UNION
               SELECT p.sip_uri FROM participants p INDEXED BY participants_of_conversation
                WHERE p.account_id = m.account_id AND p.conversation_id = m.conversation_id
                  AND p.sip_uri IS NOT NULL AND p.sip_uri IS NOT m.sender_uri
               ORDER BY 1))
       ELSE
           coalesce(
               (SELECT group_concat(uri, ';') FROM (
                   SELECT DISTINCT p.sip_uri AS uri FROM participants p INDEXED BY participants_of_conversation
                    WHERE p.account_id = m.account_id AND p.conversation_id = m.conversation_id
                      AND p.is_local = 0 AND p.sip_uri IS NOT NULL AND p.sip_uri <> a.sip_uri
                    ORDER BY 1)),
               (SELECT i.to_uri FROM invitations i
                 WHERE i.account_id = m.account_id AND i.conversation_id = m.conversation_id AND i.to_uri IS NOT NULL
                 ORDER BY i.id LIMIT 1),
               (SELECT CASE WHEN o.destination LIKE 'sip%' THEN o.destination ELSE o.recipients END
                  FROM outbox o WHERE o.id = m.outbox_id))
       END AS recipients,
       m.conversation_id,
       c.thread_id,
       CASE WHEN m.purged_at IS NULL THEN c.subject END AS subject,
       m.body,
       m.status,
       m.source,
       m.content_type,
       m.body_html,
       m.archived_at,
       m.outbox_id,
       m.correlation,
       m.account_id,
       m.purged_at
  FROM messages m
  JOIN conversations c ON c.id = m.conversation_id
  JOIN accounts a ON a.id = m.account_id;

CREATE VIEW conversation_summary AS
SELECT a.sip_uri AS account,
       c.id AS conversation_id,
       (SELECT group_concat(uri, ';') FROM (
           SELECT p.sip_uri AS uri FROM participants p INDEXED BY participants_of_conversation
            WHERE p.account_id = c.account_id AND p.conversation_id = c.id AND p.sip_uri IS NOT NULL
           UNION
           SELECT i.from_uri FROM invitations i
            WHERE i.account_id = c.account_id AND i.conversation_id = c.id AND i.from_uri IS NOT NULL
           UNION
           SELECT i.to_uri FROM invitations i
            WHERE i.account_id = c.account_id AND i.conversation_id = c.id AND i.to_uri IS NOT NULL
           ORDER BY 1)) AS participants,
       (SELECT count(*) FROM messages m WHERE m.account_id = c.account_id AND m.conversation_id = c.id) AS message_count,
       (SELECT min(m.sent_at) FROM messages m
         WHERE m.account_id = c.account_id AND m.conversation_id = c.id) AS first_message_at,
       (SELECT max(m.sent_at) FROM messages m
         WHERE m.account_id = c.account_id AND m.conversation_id = c.id) AS last_message_at,
       c.state,
       c.direction,
       c.thread_id,
       c.subject,
       c.started_at,
       c.ended_at,
       c.multiparty,
       c.continued_in
  FROM conversations c
  JOIN accounts a ON a.id = c.account_id;

CREATE VIEW outbox_status AS
SELECT coalesce(a.sip_uri, o.account) AS account,
       o.state,
       count(*) AS count,
       min(o.created_at) AS oldest_at,
       -- Why nothing is sent; NULL where the account is at work.
       min(CASE WHEN o.state <> 'queued' OR a.id IS NULL THEN NULL
                WHEN a.removed_at IS NOT NULL THEN 'the account was removed'
                WHEN a.enabled = 0 THEN 'the account is disabled'
                WHEN s.state = 'online' THEN NULL
                ELSE 'the account is ' || coalesce(replace(s.state, '_', ' '), 'stopped')
                     || coalesce(': ' || s.detail, '')
           END) AS reason
  FROM outbox o
  -- However its user spelled the account of a row that nobody has looked at yet.
  LEFT JOIN accounts a
    ON a.id = coalesce(o.account_id,
                       (SELECT k.id FROM accounts k
                         WHERE k.sip_uri = CASE WHEN instr(o.account, ':') > 0 THEN lower(trim(o.account))
                                                ELSE 'sip:' || lower(trim(o.account)) END))
  LEFT JOIN account_status s ON s.account_id = a.id
 GROUP BY coalesce(a.sip_uri, o.account), o.state;

CREATE VIEW account_overview AS
SELECT a.sip_uri AS account,
       coalesce(s.state, 'stopped') AS state,
       s.since,
       s.detail,
       (SELECT count(*) FROM messages m
         WHERE m.account_id = a.id AND m.sent_at >= strftime('%Y-%m-%dT00:00:00.000Z', 'now')) AS messages_today,
       (SELECT count(*) FROM outbox o INDEXED BY outbox_queued
         WHERE o.state = 'queued' AND o.destination IS NOT NULL AND o.account_id = a.id)
     + (SELECT count(*) FROM outbox o INDEXED BY outbox_new
         WHERE o.state = 'queued' AND o.destination IS NULL
           AND CASE WHEN instr(o.account, ':') > 0 THEN lower(trim(o.account))
                    ELSE 'sip:' || lower(trim(o.account)) END = a.sip_uri) AS queued,
       s.last_event_at,
       s.node_id,
       coalesce(s.restarts, 0) AS restarts
  FROM accounts a
  LEFT JOIN account_status s ON s.account_id = a.id
 WHERE a.removed_at IS NULL;

CREATE VIEW coverage_gaps AS
SELECT a.sip_uri AS account,
       g.from_at,
       g.to_at,
       g.reason,
       g.backfilled,
       g.detail
  FROM gaps g
  JOIN accounts a ON a.id = g.account_id;
