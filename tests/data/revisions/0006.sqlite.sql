CREATE TABLE adk_sessions_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT adk_sessions_version_pkc PRIMARY KEY (version_num)
);
CREATE TABLE sessions (
	app_name VARCHAR(128) NOT NULL, 
	user_id VARCHAR(128) NOT NULL, 
	id VARCHAR(128) NOT NULL, 
	state TEXT NOT NULL, 
	create_time DATETIME NOT NULL, 
	update_time DATETIME NOT NULL, title VARCHAR(256), labels TEXT, archive_time DATETIME, expire_time DATETIME, initial_state TEXT, 
	PRIMARY KEY (app_name, user_id, id)
);
CREATE TABLE events (
	id VARCHAR(128) NOT NULL, 
	app_name VARCHAR(128) NOT NULL, 
	user_id VARCHAR(128) NOT NULL, 
	session_id VARCHAR(128) NOT NULL, 
	invocation_id VARCHAR(256) NOT NULL, 
	timestamp DATETIME NOT NULL, 
	event_data TEXT, event_exact TEXT, 
	PRIMARY KEY (id, app_name, user_id, session_id), 
	FOREIGN KEY(app_name, user_id, session_id) REFERENCES sessions (app_name, user_id, id) ON DELETE CASCADE
);
CREATE TABLE app_states (
	app_name VARCHAR(128) NOT NULL, 
	state TEXT NOT NULL, 
	update_time DATETIME NOT NULL, 
	PRIMARY KEY (app_name)
);
CREATE TABLE user_states (
	app_name VARCHAR(128) NOT NULL, 
	user_id VARCHAR(128) NOT NULL, 
	state TEXT NOT NULL, 
	update_time DATETIME NOT NULL, 
	PRIMARY KEY (app_name, user_id)
);
CREATE TABLE adk_internal_metadata (
	"key" VARCHAR(128) NOT NULL, 
	value VARCHAR(256) NOT NULL, 
	PRIMARY KEY ("key")
);
CREATE TABLE state_changes (
	app_name VARCHAR(128) NOT NULL, 
	user_id VARCHAR(128) NOT NULL, 
	session_id VARCHAR(128) NOT NULL, 
	revision DATETIME NOT NULL, 
	number INTEGER NOT NULL, 
	change_time DATETIME NOT NULL, 
	delta TEXT NOT NULL, 
	deleted TEXT, 
	PRIMARY KEY (app_name, user_id, session_id, revision, number), 
	FOREIGN KEY(app_name, user_id, session_id) REFERENCES sessions (app_name, user_id, id) ON DELETE CASCADE
);
CREATE INDEX idx_events_app_user_session_ts_id ON events (app_name, user_id, session_id, timestamp DESC, id DESC);
CREATE INDEX idx_sessions_app_create_user_id ON sessions (app_name, create_time, user_id, id);
CREATE INDEX idx_sessions_app_user_create_id ON sessions (app_name, user_id, create_time, id);
INSERT INTO adk_internal_metadata ("key", "value") VALUES ('schema_version', '1');
INSERT INTO sessions ("app_name", "user_id", "id", "state", "create_time", "update_time", "title", "labels", "archive_time", "expire_time", "initial_state") VALUES ('notes', 'ann', 's1', '{"plain":"text"}', '2026-01-02 03:04:05.000006', '2026-01-02 03:04:08.000006', 'Notes, “ü” 😀', '{"team":"a b","ü":"😀"}', NULL, '2999-01-02 03:04:05.000006', '{}');
INSERT INTO sessions ("app_name", "user_id", "id", "state", "create_time", "update_time", "title", "labels", "archive_time", "expire_time", "initial_state") VALUES ('shop', 'Ann', 's1', '{"unicode":"¿Qué? “ü” é 👩‍👩‍👧   \\ \" '' %s {} ;\n\t","":"empty key","numbers":[0,-1,0.1,1000000000000000.0,9007199254740993,10000000000000000000000000000000000000000,5e-324],"others":[null,true,false,"1","null",{},[],{"a":{"b":[[]]}}],"nan":"adk_sessions:float:nan","infinity":"adk_sessions:float:-inf","minus zero":"adk_sessions:float:-0.0","large":"adk_sessions:float:1e+16","NUL":"adk_sessions:text:a%00b","surrogate":"adk_sessions:text:%ED%A0%80","mark":"adk_sessions:text:adk_sessions%3A"}', '2026-01-02 03:04:05.000006', '2026-01-02 03:04:05.250006', NULL, NULL, NULL, NULL, NULL);
INSERT INTO sessions ("app_name", "user_id", "id", "state", "create_time", "update_time", "title", "labels", "archive_time", "expire_time", "initial_state") VALUES ('shop', 'ann', 's1', '{"cart":["tea"]}', '2026-01-02 03:04:05.000006', '2026-01-02 03:04:16.000006', NULL, NULL, NULL, NULL, NULL);
INSERT INTO sessions ("app_name", "user_id", "id", "state", "create_time", "update_time", "title", "labels", "archive_time", "expire_time", "initial_state") VALUES ('shop', 'bøb 😀', 's 2 ', '{}', '2026-01-02 03:04:05.000006', '2026-01-02 03:04:05.000006', NULL, NULL, NULL, NULL, NULL);
INSERT INTO events ("id", "app_name", "user_id", "session_id", "invocation_id", "timestamp", "event_data", "event_exact") VALUES ('e1', 'shop', 'Ann', 's1', 'call-e1', '2026-01-02 03:04:05.250006', '{"id":"e1","invocation_id":"call-e1","author":"user","timestamp":1767323045.250006,"content":{"role":"user","parts":[{"text":"hello"},{"text":"¿Qué? “ü” é 👩‍👩‍👧   \\ \" '' %s {} ;\n\t"}]},"actions":{"state_delta":{"app:currency":"€","cart":["tea"]},"artifact_delta":{}}}', NULL);
INSERT INTO events ("id", "app_name", "user_id", "session_id", "invocation_id", "timestamp", "event_data", "event_exact") VALUES ('e1', 'shop', 'ann', 's1', 'call-e1', '2026-01-02 03:04:05.250006', '{"id":"e1","invocation_id":"call-e1","author":"user","timestamp":1767323045.250006,"content":{"role":"user","parts":[{"text":"hello"},{"text":"¿Qué? “ü” é 👩‍👩‍👧   \\ \" '' %s {} ;\n\t"}]},"actions":{"state_delta":{"app:currency":"€","cart":["tea"]},"artifact_delta":{}}}', NULL);
INSERT INTO events ("id", "app_name", "user_id", "session_id", "invocation_id", "timestamp", "event_data", "event_exact") VALUES ('e2', 'shop', 'ann', 's1', 'call-e2', '2026-01-02 03:04:06.500006', '{"id":"e2","invocation_id":"call-e2","author":"agent","timestamp":1767323046.500006,"content":{"role":"model","parts":[{"function_call":{"id":"c","name":"find","args":{"x":[1,null,{}]}}}]},"actions":{"state_delta":{},"artifact_delta":{}},"long_running_tool_ids":["c"],"branch":"root.leaf"}', NULL);
INSERT INTO events ("id", "app_name", "user_id", "session_id", "invocation_id", "timestamp", "event_data", "event_exact") VALUES ('e3', 'shop', 'ann', 's1', 'call-e3', '2026-01-02 03:04:07.000006', '{"id":"e3","invocation_id":"call-e3","author":"agent","timestamp":1767323047.000006,"content":{"role":"user","parts":[{"inline_data":{"data":"AP_-","mime_type":"a/b"}}]},"actions":{"state_delta":{},"artifact_delta":{}}}', NULL);
INSERT INTO events ("id", "app_name", "user_id", "session_id", "invocation_id", "timestamp", "event_data", "event_exact") VALUES ('e4', 'shop', 'ann', 's1', 'call-e4', '2026-01-02 03:04:07.000007', '{"id":"e4","invocation_id":"call-e4","author":"user","timestamp":1767319445.000006,"content":{"role":"user","parts":[{"text":"earlier"}]},"actions":{"state_delta":{},"artifact_delta":{}},"turn_complete":true}', NULL);
INSERT INTO events ("id", "app_name", "user_id", "session_id", "invocation_id", "timestamp", "event_data", "event_exact") VALUES ('n1', 'notes', 'ann', 's1', 'call-n1', '2026-01-02 03:04:05.000007', '{"id":"n1","invocation_id":"call-n1","author":"user","timestamp":1767323045.000006,"content":"a string","actions":{"state_delta":{},"artifact_delta":{}}}', NULL);
INSERT INTO events ("id", "app_name", "user_id", "session_id", "invocation_id", "timestamp", "event_data", "event_exact") VALUES ('n2', 'notes', 'ann', 's1', 'call-n2', '2026-01-02 03:04:06.000006', '{"id":"n2","invocation_id":"call-n2","author":"user","timestamp":1767323046.000006,"content":[1,0.5,null,true,{"k":["v"]}],"actions":{"state_delta":{},"artifact_delta":{}},"custom":{"any":"field"}}', NULL);
INSERT INTO events ("id", "app_name", "user_id", "session_id", "invocation_id", "timestamp", "event_data", "event_exact") VALUES ('n3', 'notes', 'ann', 's1', 'call-n3', '2026-01-02 03:04:07.000006', '{"id":"n3","invocation_id":"call-n3","author":"user","timestamp":1767323047.000006,"content":null,"actions":{"state_delta":{},"artifact_delta":{}},"custom_metadata":{"labels":["a",null]}}', NULL);
INSERT INTO events ("id", "app_name", "user_id", "session_id", "invocation_id", "timestamp", "event_data", "event_exact") VALUES ('n4', 'notes', 'ann', 's1', 'call-n4', '2026-01-02 03:04:08.000006', '{"id":"n4","invocation_id":"call-n4","author":"user","timestamp":1767323048.000006,"content":"adk_sessions:","actions":{"state_delta":{"plain":"text"},"artifact_delta":{}}}', NULL);
INSERT INTO events ("id", "app_name", "user_id", "session_id", "invocation_id", "timestamp", "event_data", "event_exact") VALUES ('x1', 'shop', 'ann', 's1', 'call-x1', '2026-01-02 03:04:15.000006', '{"id":"x1","invocation_id":"call-x1","author":"user","timestamp":1767323055.000006,"content":{"role":"user","parts":[{"text":"a�b"}]},"actions":{"state_delta":{"app:limit":null},"artifact_delta":{}}}', '{"id":"x1","invocation_id":"call-x1","author":"user","timestamp":1767323055.000006,"content":{"role":"user","parts":[{"text":"adk_sessions:text:a%00b"}]},"actions":{"state_delta":{"app:limit":"adk_sessions:float:-inf"},"artifact_delta":{}}}');
INSERT INTO events ("id", "app_name", "user_id", "session_id", "invocation_id", "timestamp", "event_data", "event_exact") VALUES ('x2', 'shop', 'ann', 's1', 'call-x2', '2026-01-02 03:04:16.000006', '{"id":"x2","invocation_id":"call-x2","author":"agent","timestamp":1767323056.000006,"content":{"role":"user","parts":[{"text":"half�"}]},"actions":{"state_delta":{},"artifact_delta":{}}}', '{"id":"x2","invocation_id":"call-x2","author":"agent","timestamp":1767323056.000006,"content":{"role":"user","parts":[{"text":"adk_sessions:text:half%ED%A0%80"}]},"actions":{"state_delta":{},"artifact_delta":{}}}');
INSERT INTO app_states ("app_name", "state", "update_time") VALUES ('notes', '{}', '2026-01-02 03:04:05.000006');
INSERT INTO app_states ("app_name", "state", "update_time") VALUES ('shop', '{"currency":"€","limit":"adk_sessions:float:-inf"}', '2026-01-02 03:04:05.000006');
INSERT INTO user_states ("app_name", "user_id", "state", "update_time") VALUES ('notes', 'ann', '{"name":"Ann at notes"}', '2026-01-02 03:04:05.000006');
INSERT INTO user_states ("app_name", "user_id", "state", "update_time") VALUES ('shop', 'Ann', '{"name":"another Ann","seen":[1,2]}', '2026-01-02 03:04:05.000006');
INSERT INTO user_states ("app_name", "user_id", "state", "update_time") VALUES ('shop', 'ann', '{"name":"Ann"}', '2026-01-02 03:04:05.000006');
INSERT INTO user_states ("app_name", "user_id", "state", "update_time") VALUES ('shop', 'bøb 😀', '{}', '2026-01-02 03:04:05.000006');
INSERT INTO state_changes ("app_name", "user_id", "session_id", "revision", "number", "change_time", "delta", "deleted") VALUES ('notes', 'ann', 's1', '2026-01-02 03:04:05.000007', '1', '2026-01-02 03:04:05.000007', '{"nan":"adk_sessions:float:nan"}', '{"draft":true}');
INSERT INTO adk_sessions_version ("version_num") VALUES ('0006');
