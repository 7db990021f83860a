CREATE TABLE public.adk_internal_metadata (
    key character varying(128) NOT NULL,
    value character varying(256) NOT NULL
);
CREATE TABLE public.adk_sessions_version (
    version_num character varying(32) NOT NULL
);
CREATE TABLE public.app_states (
    app_name character varying(128) NOT NULL,
    state jsonb NOT NULL,
    update_time timestamp without time zone NOT NULL
);
CREATE TABLE public.events (
    id character varying(128) NOT NULL,
    app_name character varying(128) NOT NULL,
    user_id character varying(128) NOT NULL,
    session_id character varying(128) NOT NULL,
    invocation_id character varying(256) NOT NULL,
    "timestamp" timestamp without time zone NOT NULL,
    event_data jsonb,
    event_exact text
);
CREATE TABLE public.sessions (
    app_name character varying(128) NOT NULL,
    user_id character varying(128) NOT NULL,
    id character varying(128) NOT NULL,
    state jsonb NOT NULL,
    create_time timestamp without time zone NOT NULL,
    update_time timestamp without time zone NOT NULL,
    title character varying(256),
    labels jsonb,
    archive_time timestamp without time zone,
    expire_time timestamp without time zone,
    initial_state jsonb
);
CREATE TABLE public.state_changes (
    app_name character varying(128) NOT NULL,
    user_id character varying(128) NOT NULL,
    session_id character varying(128) NOT NULL,
    revision timestamp without time zone NOT NULL,
    number integer NOT NULL,
    change_time timestamp without time zone NOT NULL,
    delta jsonb NOT NULL,
    deleted jsonb
);
CREATE TABLE public.user_states (
    app_name character varying(128) NOT NULL,
    user_id character varying(128) NOT NULL,
    state jsonb NOT NULL,
    update_time timestamp without time zone NOT NULL
);
ALTER TABLE ONLY public.adk_internal_metadata
    ADD CONSTRAINT adk_internal_metadata_pkey PRIMARY KEY (key);
ALTER TABLE ONLY public.adk_sessions_version
    ADD CONSTRAINT adk_sessions_version_pkc PRIMARY KEY (version_num);
ALTER TABLE ONLY public.app_states
    ADD CONSTRAINT app_states_pkey PRIMARY KEY (app_name);
ALTER TABLE ONLY public.events
    ADD CONSTRAINT events_pkey PRIMARY KEY (id, app_name, user_id, session_id);
ALTER TABLE ONLY public.sessions
    ADD CONSTRAINT sessions_pkey PRIMARY KEY (app_name, user_id, id);
ALTER TABLE ONLY public.state_changes
    ADD CONSTRAINT state_changes_pkey PRIMARY KEY (app_name, user_id, session_id, revision, number);
ALTER TABLE ONLY public.user_states
    ADD CONSTRAINT user_states_pkey PRIMARY KEY (app_name, user_id);
CREATE INDEX idx_events_app_user_session_ts_id ON public.events USING btree (app_name, user_id, session_id, "timestamp" DESC, id DESC);
ALTER TABLE ONLY public.events
    ADD CONSTRAINT events_app_name_user_id_session_id_fkey FOREIGN KEY (app_name, user_id, session_id) REFERENCES public.sessions(app_name, user_id, id) ON DELETE CASCADE;
ALTER TABLE ONLY public.state_changes
    ADD CONSTRAINT state_changes_app_name_user_id_session_id_fkey FOREIGN KEY (app_name, user_id, session_id) REFERENCES public.sessions(app_name, user_id, id) ON DELETE CASCADE;
INSERT INTO adk_internal_metadata ("key", "value") VALUES ('schema_version', '1');
INSERT INTO sessions ("app_name", "user_id", "id", "state", "create_time", "update_time", "title", "labels", "archive_time", "expire_time", "initial_state") VALUES ('notes', 'ann', 's1', '{"plain": "text"}', '2026-01-02 03:04:05.000006', '2026-01-02 03:04:08.000006', 'Notes, “ü” 😀', '{"ü": "😀", "team": "a b"}', NULL, '2999-01-02 03:04:05.000006', '{}');
INSERT INTO sessions ("app_name", "user_id", "id", "state", "create_time", "update_time", "title", "labels", "archive_time", "expire_time", "initial_state") VALUES ('shop', 'Ann', 's1', '{"": "empty key", "NUL": "adk_sessions:text:a%00b", "nan": "adk_sessions:float:nan", "mark": "adk_sessions:text:adk_sessions%3A", "large": "adk_sessions:float:1e+16", "others": [null, true, false, "1", "null", {}, [], {"a": {"b": [[]]}}], "numbers": [0, -1, 0.1, 1000000000000000.0, 9007199254740993, 10000000000000000000000000000000000000000, 0.000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000005], "unicode": "¿Qué? “ü” é 👩‍👩‍👧   \\ \" '' %s {} ;\n\t", "infinity": "adk_sessions:float:-inf", "surrogate": "adk_sessions:text:%ED%A0%80", "minus zero": "adk_sessions:float:-0.0"}', '2026-01-02 03:04:05.000006', '2026-01-02 03:04:05.250006', NULL, NULL, NULL, NULL, NULL);
INSERT INTO sessions ("app_name", "user_id", "id", "state", "create_time", "update_time", "title", "labels", "archive_time", "expire_time", "initial_state") VALUES ('shop', 'ann', 's1', '{"cart": ["tea"]}', '2026-01-02 03:04:05.000006', '2026-01-02 03:04:16.000006', NULL, NULL, NULL, NULL, NULL);
INSERT INTO sessions ("app_name", "user_id", "id", "state", "create_time", "update_time", "title", "labels", "archive_time", "expire_time", "initial_state") VALUES ('shop', 'bøb 😀', 's 2 ', '{}', '2026-01-02 03:04:05.000006', '2026-01-02 03:04:05.000006', NULL, NULL, NULL, NULL, NULL);
INSERT INTO events ("id", "app_name", "user_id", "session_id", "invocation_id", "timestamp", "event_data", "event_exact") VALUES ('e1', 'shop', 'Ann', 's1', 'call-e1', '2026-01-02 03:04:05.250006', '{"id": "e1", "author": "user", "actions": {"state_delta": {"cart": ["tea"], "app:currency": "€"}, "artifact_delta": {}}, "content": {"role": "user", "parts": [{"text": "hello"}, {"text": "¿Qué? “ü” é 👩‍👩‍👧   \\ \" '' %s {} ;\n\t"}]}, "timestamp": 1767323045.250006, "invocation_id": "call-e1"}', NULL);
INSERT INTO events ("id", "app_name", "user_id", "session_id", "invocation_id", "timestamp", "event_data", "event_exact") VALUES ('e1', 'shop', 'ann', 's1', 'call-e1', '2026-01-02 03:04:05.250006', '{"id": "e1", "author": "user", "actions": {"state_delta": {"cart": ["tea"], "app:currency": "€"}, "artifact_delta": {}}, "content": {"role": "user", "parts": [{"text": "hello"}, {"text": "¿Qué? “ü” é 👩‍👩‍👧   \\ \" '' %s {} ;\n\t"}]}, "timestamp": 1767323045.250006, "invocation_id": "call-e1"}', NULL);
INSERT INTO events ("id", "app_name", "user_id", "session_id", "invocation_id", "timestamp", "event_data", "event_exact") VALUES ('e2', 'shop', 'ann', 's1', 'call-e2', '2026-01-02 03:04:06.500006', '{"id": "e2", "author": "agent", "branch": "root.leaf", "actions": {"state_delta": {}, "artifact_delta": {}}, "content": {"role": "model", "parts": [{"function_call": {"id": "c", "args": {"x": [1, null, {}]}, "name": "find"}}]}, "timestamp": 1767323046.500006, "invocation_id": "call-e2", "long_running_tool_ids": ["c"]}', NULL);
INSERT INTO events ("id", "app_name", "user_id", "session_id", "invocation_id", "timestamp", "event_data", "event_exact") VALUES ('e3', 'shop', 'ann', 's1', 'call-e3', '2026-01-02 03:04:07.000006', '{"id": "e3", "author": "agent", "actions": {"state_delta": {}, "artifact_delta": {}}, "content": {"role": "user", "parts": [{"inline_data": {"data": "AP_-", "mime_type": "a/b"}}]}, "timestamp": 1767323047.000006, "invocation_id": "call-e3"}', NULL);
INSERT INTO events ("id", "app_name", "user_id", "session_id", "invocation_id", "timestamp", "event_data", "event_exact") VALUES ('e4', 'shop', 'ann', 's1', 'call-e4', '2026-01-02 03:04:07.000007', '{"id": "e4", "author": "user", "actions": {"state_delta": {}, "artifact_delta": {}}, "content": {"role": "user", "parts": [{"text": "earlier"}]}, "timestamp": 1767319445.000006, "invocation_id": "call-e4", "turn_complete": true}', NULL);
INSERT INTO events ("id", "app_name", "user_id", "session_id", "invocation_id", "timestamp", "event_data", "event_exact") VALUES ('n1', 'notes', 'ann', 's1', 'call-n1', '2026-01-02 03:04:05.000007', '{"id": "n1", "author": "user", "actions": {"state_delta": {}, "artifact_delta": {}}, "content": "a string", "timestamp": 1767323045.000006, "invocation_id": "call-n1"}', NULL);
INSERT INTO events ("id", "app_name", "user_id", "session_id", "invocation_id", "timestamp", "event_data", "event_exact") VALUES ('n2', 'notes', 'ann', 's1', 'call-n2', '2026-01-02 03:04:06.000006', '{"id": "n2", "author": "user", "custom": {"any": "field"}, "actions": {"state_delta": {}, "artifact_delta": {}}, "content": [1, 0.5, null, true, {"k": ["v"]}], "timestamp": 1767323046.000006, "invocation_id": "call-n2"}', NULL);
INSERT INTO events ("id", "app_name", "user_id", "session_id", "invocation_id", "timestamp", "event_data", "event_exact") VALUES ('n3', 'notes', 'ann', 's1', 'call-n3', '2026-01-02 03:04:07.000006', '{"id": "n3", "author": "user", "actions": {"state_delta": {}, "artifact_delta": {}}, "content": null, "timestamp": 1767323047.000006, "invocation_id": "call-n3", "custom_metadata": {"labels": ["a", null]}}', NULL);
INSERT INTO events ("id", "app_name", "user_id", "session_id", "invocation_id", "timestamp", "event_data", "event_exact") VALUES ('n4', 'notes', 'ann', 's1', 'call-n4', '2026-01-02 03:04:08.000006', '{"id": "n4", "author": "user", "actions": {"state_delta": {"plain": "text"}, "artifact_delta": {}}, "content": "adk_sessions:", "timestamp": 1767323048.000006, "invocation_id": "call-n4"}', NULL);
INSERT INTO events ("id", "app_name", "user_id", "session_id", "invocation_id", "timestamp", "event_data", "event_exact") VALUES ('x1', 'shop', 'ann', 's1', 'call-x1', '2026-01-02 03:04:15.000006', '{"id": "x1", "author": "user", "actions": {"state_delta": {"app:limit": null}, "artifact_delta": {}}, "content": {"role": "user", "parts": [{"text": "a�b"}]}, "timestamp": 1767323055.000006, "invocation_id": "call-x1"}', '{"id":"x1","invocation_id":"call-x1","author":"user","timestamp":1767323055.000006,"content":{"role":"user","parts":[{"text":"adk_sessions:text:a%00b"}]},"actions":{"state_delta":{"app:limit":"adk_sessions:float:-inf"},"artifact_delta":{}}}');
INSERT INTO events ("id", "app_name", "user_id", "session_id", "invocation_id", "timestamp", "event_data", "event_exact") VALUES ('x2', 'shop', 'ann', 's1', 'call-x2', '2026-01-02 03:04:16.000006', '{"id": "x2", "author": "agent", "actions": {"state_delta": {}, "artifact_delta": {}}, "content": {"role": "user", "parts": [{"text": "half�"}]}, "timestamp": 1767323056.000006, "invocation_id": "call-x2"}', '{"id":"x2","invocation_id":"call-x2","author":"agent","timestamp":1767323056.000006,"content":{"role":"user","parts":[{"text":"adk_sessions:text:half%ED%A0%80"}]},"actions":{"state_delta":{},"artifact_delta":{}}}');
INSERT INTO app_states ("app_name", "state", "update_time") VALUES ('notes', '{}', '2026-01-02 03:04:05.000006');
INSERT INTO app_states ("app_name", "state", "update_time") VALUES ('shop', '{"limit": "adk_sessions:float:-inf", "currency": "€"}', '2026-01-02 03:04:05.000006');
INSERT INTO user_states ("app_name", "user_id", "state", "update_time") VALUES ('notes', 'ann', '{"name": "Ann at notes"}', '2026-01-02 03:04:05.000006');
INSERT INTO user_states ("app_name", "user_id", "state", "update_time") VALUES ('shop', 'Ann', '{"name": "another Ann", "seen": [1, 2]}', '2026-01-02 03:04:05.000006');
INSERT INTO user_states ("app_name", "user_id", "state", "update_time") VALUES ('shop', 'ann', '{"name": "Ann"}', '2026-01-02 03:04:05.000006');
INSERT INTO user_states ("app_name", "user_id", "state", "update_time") VALUES ('shop', 'bøb 😀', '{}', '2026-01-02 03:04:05.000006');
INSERT INTO state_changes ("app_name", "user_id", "session_id", "revision", "number", "change_time", "delta", "deleted") VALUES ('notes', 'ann', 's1', '2026-01-02 03:04:05.000007', '1', '2026-01-02 03:04:05.000007', '{"nan": "adk_sessions:float:nan"}', '{"draft": true}');
INSERT INTO adk_sessions_version ("version_num") VALUES ('0005');
