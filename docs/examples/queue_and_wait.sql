-- Queues a message on PostgreSQL and waits for its outcome; for psql, by anybody with the role ucwa_relay_sender:
--
--     psql "$DATABASE" -v ON_ERROR_STOP=1 -v from=alice@contoso.com -v to=bob@contoso.com -v text='Deploy finished' \
--          -f queue_and_wait.sql
--
-- Exit code 0: delivered; 3: it ended otherwise or has not ended within a minute, the reason is on stderr.

\set QUIET on
INSERT INTO outbox (account, recipients, body) VALUES (:'from', :'to', :'text') RETURNING id \gset
SELECT set_config('example.row', :'id', false) AS row \gset

DO $$
DECLARE
    outcome record;
BEGIN
    FOR fifth_of_a_second IN 1..300 LOOP
        SELECT state, last_error INTO STRICT outcome FROM outbox
         WHERE id = current_setting('example.row')::bigint;
        EXIT WHEN outcome.state NOT IN ('queued', 'held', 'sending', 'sent');
        COMMIT;                         -- ends the snapshot, and holds up nobody's vacuum
        PERFORM pg_sleep(0.2);
    END LOOP;
    IF outcome.state <> 'delivered' THEN
        RAISE EXCEPTION 'row % is %: %', current_setting('example.row'), outcome.state,
                        coalesce(outcome.last_error, 'nobody has said why');
    END IF;
END
$$;
\echo row :id: delivered
