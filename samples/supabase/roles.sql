-- After the tables and the policies of adk-sessions sql --rls, as their owner. Run it once.

BEGIN;

-- What every user's role may do; nobody logs in as this one.
CREATE ROLE shop_user NOLOGIN;
GRANT USAGE ON SCHEMA agents TO shop_user;
GRANT SELECT, INSERT, UPDATE, DELETE
    ON agents.sessions, agents.events, agents.state_changes, agents.app_states, agents.user_states
    TO shop_user;
GRANT SELECT ON agents.adk_internal_metadata, agents.adk_sessions_version TO shop_user;

-- Whose role is whose. A role sees its own line alone, through the view.
CREATE TABLE agents.adk_role_users (
    role_name name PRIMARY KEY, app_name text NOT NULL, user_id text NOT NULL
);
CREATE VIEW agents.adk_own_user WITH (security_barrier) AS
    SELECT app_name, user_id FROM agents.adk_role_users WHERE role_name = current_user;
GRANT SELECT ON agents.adk_own_user TO shop_user;

-- Required on top of the policies that compare with the settings: whoever has the password of a
-- role can set them to anything.
CREATE POLICY own_role ON agents.sessions AS RESTRICTIVE
    USING ((app_name, user_id) IN (SELECT app_name, user_id FROM agents.adk_own_user));
CREATE POLICY own_role ON agents.events AS RESTRICTIVE
    USING ((app_name, user_id) IN (SELECT app_name, user_id FROM agents.adk_own_user));
CREATE POLICY own_role ON agents.state_changes AS RESTRICTIVE
    USING ((app_name, user_id) IN (SELECT app_name, user_id FROM agents.adk_own_user));
CREATE POLICY own_role ON agents.user_states AS RESTRICTIVE
    USING ((app_name, user_id) IN (SELECT app_name, user_id FROM agents.adk_own_user));
CREATE POLICY own_role ON agents.app_states AS RESTRICTIVE
    USING (app_name IN (SELECT app_name FROM agents.adk_own_user));

COMMIT;
