BEGIN TRANSACTION;
CREATE TABLE app_states (
    app_name TEXT PRIMARY KEY,
    state TEXT NOT NULL,
    update_time REAL NOT NULL
);
INSERT INTO "app_states" VALUES('shop','{"n":{"k":1},"motd":"hi"}',1700000001.25);
CREATE TABLE events (
    id TEXT NOT NULL,
    app_name TEXT NOT NULL,
    user_id TEXT NOT NULL,
    session_id TEXT NOT NULL,
    invocation_id TEXT NOT NULL,
    timestamp REAL NOT NULL,
    event_data TEXT NOT NULL,
    PRIMARY KEY (app_name, user_id, session_id, id),
    FOREIGN KEY (app_name, user_id, session_id) REFERENCES sessions(app_name, user_id, id) ON DELETE CASCADE
);
INSERT INTO "events" VALUES('e1','shop','ann','talk','invocation',1700000001.25,'{"content":{"parts":[{"text":"¿Qué? 😀"}],"role":"user"},"invocation_id":"invocation","author":"user","actions":{"state_delta":{"b":0.30000000000000004,"user:seen":1,"app:n":{"k":1}},"artifact_delta":{},"requested_auth_configs":{},"requested_tool_confirmations":{}},"node_info":{"path":""},"id":"e1","timestamp":1700000001.25}');
INSERT INTO "events" VALUES('e2','shop','ann','talk','invocation',1.70000000225000095369e+09,'{"content":{"parts":[{"text":"NUL \u0000 inside"}],"role":"user"},"invocation_id":"invocation","author":"user","actions":{"state_delta":{"a":null},"artifact_delta":{},"requested_auth_configs":{},"requested_tool_confirmations":{}},"node_info":{"path":""},"id":"e2","timestamp":1700000002.250001}');
INSERT INTO "events" VALUES('z','shop','ann','talk','invocation',1.70000000337345600126e+09,'{"content":{"parts":[{"text":"hello"}],"role":"user"},"invocation_id":"invocation","author":"user","actions":{"state_delta":{"big":1000000000000000000000000000000,"float":1e+16},"artifact_delta":{},"requested_auth_configs":{},"requested_tool_confirmations":{}},"node_info":{"path":""},"id":"z","timestamp":1700000003.373456}');
INSERT INTO "events" VALUES('y','shop','ann','talk','invocation',1.70000000337345600126e+09,'{"content":{"parts":[{"text":"at the same time, and appended later"}],"role":"user"},"invocation_id":"invocation","author":"user","actions":{"state_delta":{},"artifact_delta":{},"requested_auth_configs":{},"requested_tool_confirmations":{}},"node_info":{"path":""},"id":"y","timestamp":1700000003.373456}');
INSERT INTO "events" VALUES('x','shop','ann','talk','invocation',1.70000000337345600126e+09,'{"content":{"parts":[{"text":"the same once more"}],"role":"user"},"invocation_id":"invocation","author":"user","actions":{"state_delta":{},"artifact_delta":{},"requested_auth_configs":{},"requested_tool_confirmations":{}},"node_info":{"path":""},"id":"x","timestamp":1700000003.373456}');
INSERT INTO "events" VALUES('e3','shop','ann','talk','invocation',1700000004.25,'{"content":{"parts":[{"text":"hello"}],"role":"user"},"custom_metadata":{"k":[1.5,null,{}]},"invocation_id":"invocation","author":"user","actions":{"state_delta":{},"artifact_delta":{},"requested_auth_configs":{},"requested_tool_confirmations":{}},"node_info":{"path":""},"long_running_tool_ids":["t"],"id":"e3","timestamp":1700000004.25}');
INSERT INTO "events" VALUES('e4','shop','ann','talk','',1700000005.25,'{"content":{"parts":[{"inline_data":{"data":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4vMDEyMzQ1Njc4OTo7PD0-P0BBQkNERUZHSElKS0xNTk9QUVJTVFVWV1hZWltcXV5fYGFiY2RlZmdoaWprbG1ub3BxcnN0dXZ3eHl6e3x9fn-AgYKDhIWGh4iJiouMjY6PkJGSk5SVlpeYmZqbnJ2en6ChoqOkpaanqKmqq6ytrq-wsbKztLW2t7i5uru8vb6_wMHCw8TFxsfIycrLzM3Oz9DR0tPU1dbX2Nna29zd3t_g4eLj5OXm5-jp6uvs7e7v8PHy8_T19vf4-fr7_P3-_w==","mime_type":"a/b"}},{"function_call":{"id":"t","args":{"x":1},"name":"f"}}],"role":"model"},"invocation_id":"","author":"agent","actions":{"state_delta":{},"artifact_delta":{},"requested_auth_configs":{},"requested_tool_confirmations":{}},"node_info":{"path":""},"id":"e4","timestamp":1700000005.25}');
INSERT INTO "events" VALUES('first','shop','ann','back in time','invocation',1700000050.25,'{"content":{"parts":[{"text":"hello"}],"role":"user"},"invocation_id":"invocation","author":"user","actions":{"state_delta":{},"artifact_delta":{},"requested_auth_configs":{},"requested_tool_confirmations":{}},"node_info":{"path":""},"id":"first","timestamp":1700000050.25}');
INSERT INTO "events" VALUES('second','shop','ann','back in time','invocation',1700000010.25,'{"content":{"parts":[{"text":"hello"}],"role":"user"},"invocation_id":"invocation","author":"user","actions":{"state_delta":{},"artifact_delta":{},"requested_auth_configs":{},"requested_tool_confirmations":{}},"node_info":{"path":""},"id":"second","timestamp":1700000010.25}');
INSERT INTO "events" VALUES('third','shop','ann','back in time','invocation',1700000010.75,'{"content":{"parts":[{"text":"hello"}],"role":"user"},"invocation_id":"invocation","author":"user","actions":{"state_delta":{},"artifact_delta":{},"requested_auth_configs":{},"requested_tool_confirmations":{}},"node_info":{"path":""},"id":"third","timestamp":1700000010.75}');
CREATE TABLE sessions (
    app_name TEXT NOT NULL,
    user_id TEXT NOT NULL,
    id TEXT NOT NULL,
    state TEXT NOT NULL,
    create_time REAL NOT NULL,
    update_time REAL NOT NULL,
    PRIMARY KEY (app_name, user_id, id)
);
INSERT INTO "sessions" VALUES('shop','ann','talk','{"big":1000000000000000000000000000000,"float":1.0e+16,"a":null,"b":0.30000000000000004}',1699999901.25,1700000005.25);
INSERT INTO "sessions" VALUES('shop','ann','back in time','{}',1699999902.25,1700000010.75);
INSERT INTO "sessions" VALUES('shop','ann','odd','{"nan": NaN, "inf": -Infinity, "nul": "a\u0000b", "surrogate": "a\ud800b", "big": 1000000000000000000000000000000, "float": 1e+16, "zero": -0.0, "marked": "adk_sessions:text:x", "nul\u0000key": 1}',1699999903.25,1699999903.25);
INSERT INTO "sessions" VALUES('shop','Ann','talk','{}',1699999904.25,1699999904.25);
INSERT INTO "sessions" VALUES('quiet','üüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüü','💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬💬','{}',1699999905.25,1699999905.25);
CREATE TABLE user_states (
    app_name TEXT NOT NULL,
    user_id TEXT NOT NULL,
    state TEXT NOT NULL,
    update_time REAL NOT NULL,
    PRIMARY KEY (app_name, user_id)
);
INSERT INTO "user_states" VALUES('shop','ann','{"seen":1,"name":"Ann"}',1700000001.25);
COMMIT;
