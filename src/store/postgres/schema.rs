//! The schema of a PostgreSQL database, its roles and their rights, brought up to date at every start.

use std::borrow::Cow;

use sqlx::{
    Connection, PgConnection, Row, SqlSafeStr,
    migrate::{MigrateError, Migration, MigrationType, Migrator},
};

use crate::store::{StoreError, migrations::refused, trouble::failed};

/// Every migration there ever was, in order: number, name, text. A published one is never changed.
pub(super) const MIGRATIONS: [(i64, &str, &str); 2] = [
    (1, "schema", include_str!("../../../migrations/postgres/0001_schema.sql")),
    (2, "comments", include_str!("../../../migrations/postgres/0002_comments.sql")),
];

/// What only somebody with the right to create roles can do, once for each server.
const CREATE_ROLES: [(&str, &str); 2] = [
    ("ucwa_relay_reader", "CREATE ROLE ucwa_relay_reader NOLOGIN"),
    ("ucwa_relay_sender", "CREATE ROLE ucwa_relay_sender NOLOGIN"),
];

/// What the roles may do. Sealed passwords are nobody's; of the queue a sender sees and changes what it inserted (to which
/// states, a trigger says), and nobody else sees less for it. Row-level security does not bind the tables' owner, as whom the service usually runs.
const RIGHTS: &str = "
    REVOKE ALL ON ALL TABLES IN SCHEMA public FROM ucwa_relay_reader, ucwa_relay_sender;
    GRANT USAGE ON SCHEMA public TO ucwa_relay_reader, ucwa_relay_sender;
    GRANT SELECT ON account_status, nodes, account_leases, sessions, gaps, backfills, conversations, participants, typing,
                    messages, invitations, chain_heads, event_quarantine, holds, retention_runs, access_log, outbox,
                    outbox_attempts,
                    message_history, conversation_summary, outbox_status, account_overview, coverage_gaps
       TO ucwa_relay_reader;
    GRANT SELECT (id, sip_uri, username, auth, secret_ref, display_name, enabled, invitations, retention_days, created_at,
                  updated_at, endpoint_id, removed_at)
       ON accounts TO ucwa_relay_reader;
    GRANT INSERT (account, recipients, body, content_type, subject, importance, conversation_id, thread_id, priority,
                  send_after, expires_at, max_attempts, idempotency_key, correlation, state)
       ON outbox TO ucwa_relay_sender;
    GRANT UPDATE (account, recipients, body, content_type, subject, importance, conversation_id, thread_id, priority,
                  send_after, expires_at, max_attempts, correlation, state)
       ON outbox TO ucwa_relay_sender;
    GRANT SELECT ON outbox TO ucwa_relay_sender;
    ALTER TABLE outbox ENABLE ROW LEVEL SECURITY;
    DROP POLICY IF EXISTS outbox_of_senders ON outbox;
    CREATE POLICY outbox_of_senders ON outbox TO ucwa_relay_sender
        USING (inserted_by = session_user) WITH CHECK (inserted_by = session_user);
    DROP POLICY IF EXISTS outbox_for_readers ON outbox;
    CREATE POLICY outbox_for_readers ON outbox FOR SELECT TO ucwa_relay_reader USING (true);
    DROP POLICY IF EXISTS outbox_for_others ON outbox;
    CREATE POLICY outbox_for_others ON outbox
        USING (NOT pg_has_role('ucwa_relay_sender', 'MEMBER'))
        WITH CHECK (NOT pg_has_role('ucwa_relay_sender', 'MEMBER'));";

/// Applies what is missing. A database that is up to date is only looked at, so that a tool needs no more rights than its
/// work does.
pub(super) async fn bring_up_to_date(connection: &mut PgConnection, shown: &str) -> Result<(), StoreError> {
    if !is_up_to_date(connection).await? {
        check_encoding(connection, shown).await?;
        let migrations = MIGRATIONS
            .into_iter()
            .map(|(version, name, sql)| {
                Migration::new(version, Cow::Borrowed(name), MigrationType::Simple, sql.into_sql_str(), false)
            })
            .collect();
        // Two programs that come at once take turns: the driver holds a lock meanwhile.
        Migrator::with_migrations(migrations)
            .run(&mut *connection)
            .await
            .map_err(|error| refused(error, MIGRATIONS.len()))?;
    }
    give_rights(connection).await
}

/// The newest version that was applied; `None`: the database is empty.
pub(super) async fn applied(connection: &mut PgConnection) -> Result<Option<i64>, StoreError> {
    let failed = failed("looking at the schema");
    let exists: bool = sqlx::query_scalar("SELECT to_regclass('_sqlx_migrations') IS NOT NULL")
        .fetch_one(&mut *connection)
        .await
        .map_err(&failed)?;
    if !exists {
        return Ok(None);
    }
    sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations WHERE success")
        .fetch_one(connection)
        .await
        .map_err(&failed)
}

async fn is_up_to_date(connection: &mut PgConnection) -> Result<bool, StoreError> {
    let newest = applied(connection).await?;
    let known = i64::try_from(MIGRATIONS.len()).unwrap_or(i64::MAX);
    match newest {
        Some(version) if version > known => {
            Err(refused(MigrateError::VersionMissing(version), MIGRATIONS.len()))
        }
        newest => Ok(newest == Some(known)),
    }
}

/// Every character that people write has to fit.
async fn check_encoding(connection: &mut PgConnection, shown: &str) -> Result<(), StoreError> {
    let encoding: String = sqlx::query_scalar("SELECT current_setting('server_encoding')")
        .fetch_one(connection)
        .await
        .map_err(failed("looking at the encoding"))?;
    if encoding == "UTF8" {
        return Ok(());
    }
    Err(StoreError::Schema {
        problem: format!(
            "the database {shown} is encoded in {encoding}, which has not all characters; create one with \
             createdb --encoding UTF8 --template template0 DATABASE"
        ),
    })
}

/// Creates the roles and gives them their rights, as far as this user may. Done only where something is missing.
async fn give_rights(connection: &mut PgConnection) -> Result<(), StoreError> {
    let failed = failed("looking at the roles");
    let row = sqlx::query(
        "SELECT ARRAY(SELECT rolname::text FROM pg_roles
                       WHERE rolname IN ('ucwa_relay_reader', 'ucwa_relay_sender')) AS roles,
                EXISTS (SELECT FROM pg_policy WHERE polname = 'outbox_for_others') AS is_done",
    )
    .fetch_one(&mut *connection)
    .await
    .map_err(&failed)?;
    let roles: Vec<String> = row.try_get("roles").map_err(&failed)?;
    if row.try_get("is_done").map_err(&failed)? {
        return Ok(());
    }
    for (role, statement) in CREATE_ROLES {
        if roles.iter().any(|known| known == role) {
            continue;
        }
        if let Err(error) = sqlx::query(statement).execute(&mut *connection).await {
            let is_there_now = error
                .as_database_error()
                .is_some_and(|error| matches!(error.code().as_deref(), Some("42710" | "23505")));
            if !is_there_now {
                tracing::warn!(
                    %error,
                    "the role {role} is missing and can't be created by this user: let an administrator run \
                     \"{statement}\" and then `ucwa-relay migrate`; until then only the tables' owner has access"
                );
                return Ok(());
            }
        }
    }
    // Two programs that come at once would get into each other's way in the catalogue.
    let rights = async {
        let mut transaction = connection.begin().await?;
        sqlx::query("SELECT pg_advisory_xact_lock(6076142301170132)").execute(&mut *transaction).await?;
        sqlx::raw_sql(RIGHTS).execute(&mut *transaction).await?;
        transaction.commit().await
    };
    if let Err(error) = rights.await {
        tracing::warn!(
            %error,
            "the rights of ucwa_relay_reader and ucwa_relay_sender are not given: let the owner of the tables run \
             `ucwa-relay migrate`"
        );
    }
    Ok(())
}
