CREATE TABLE `adk_internal_metadata` (
  `key` varchar(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin NOT NULL,
  `value` varchar(256) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin NOT NULL,
  PRIMARY KEY (`key`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_general_ci;
CREATE TABLE `sessions` (
  `app_name` varchar(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin NOT NULL,
  `user_id` varchar(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin NOT NULL,
  `id` varchar(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin NOT NULL,
  `state` longtext NOT NULL,
  `create_time` datetime(6) NOT NULL,
  `update_time` datetime(6) NOT NULL,
  `title` varchar(256) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin DEFAULT NULL,
  `labels` longtext DEFAULT NULL,
  `archive_time` datetime(6) DEFAULT NULL,
  `expire_time` datetime(6) DEFAULT NULL,
  `initial_state` longtext DEFAULT NULL,
  PRIMARY KEY (`app_name`,`user_id`,`id`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_general_ci;
CREATE TABLE `events` (
  `id` varchar(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin NOT NULL,
  `app_name` varchar(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin NOT NULL,
  `user_id` varchar(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin NOT NULL,
  `session_id` varchar(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin NOT NULL,
  `invocation_id` varchar(256) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin NOT NULL,
  `timestamp` datetime(6) NOT NULL,
  `event_data` longtext DEFAULT NULL,
  `event_exact` longtext DEFAULT NULL,
  PRIMARY KEY (`id`,`app_name`,`user_id`,`session_id`),
  KEY `idx_events_app_user_session_ts_id` (`app_name`,`user_id`,`session_id`,`timestamp` DESC,`id` DESC),
  CONSTRAINT `events_ibfk_1` FOREIGN KEY (`app_name`, `user_id`, `session_id`) REFERENCES `sessions` (`app_name`, `user_id`, `id`) ON DELETE CASCADE
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_general_ci;
CREATE TABLE `app_states` (
  `app_name` varchar(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin NOT NULL,
  `state` longtext NOT NULL,
  `update_time` datetime(6) NOT NULL,
  PRIMARY KEY (`app_name`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_general_ci;
CREATE TABLE `user_states` (
  `app_name` varchar(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin NOT NULL,
  `user_id` varchar(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin NOT NULL,
  `state` longtext NOT NULL,
  `update_time` datetime(6) NOT NULL,
  PRIMARY KEY (`app_name`,`user_id`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_general_ci;
CREATE TABLE `state_changes` (
  `app_name` varchar(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin NOT NULL,
  `user_id` varchar(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin NOT NULL,
  `session_id` varchar(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin NOT NULL,
  `revision` datetime(6) NOT NULL,
  `number` int(11) NOT NULL,
  `change_time` datetime(6) NOT NULL,
  `delta` longtext NOT NULL,
  `deleted` longtext DEFAULT NULL,
  PRIMARY KEY (`app_name`,`user_id`,`session_id`,`revision`,`number`),
  CONSTRAINT `state_changes_ibfk_1` FOREIGN KEY (`app_name`, `user_id`, `session_id`) REFERENCES `sessions` (`app_name`, `user_id`, `id`) ON DELETE CASCADE
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_general_ci;
CREATE TABLE `adk_sessions_version` (
  `version_num` varchar(32) NOT NULL,
  PRIMARY KEY (`version_num`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_general_ci;
INSERT INTO adk_internal_metadata (`key`, `value`) VALUES ('schema_version', '1');
INSERT INTO sessions (`app_name`, `user_id`, `id`, `state`, `create_time`, `update_time`, `title`, `labels`, `archive_time`, `expire_time`, `initial_state`) VALUES ('notes', 'ann', 's1', '{"plain":"text"}', '2026-01-02 03:04:05.000006', '2026-01-02 03:04:08.000006', 'Notes, “ü” 😀', '{"team":"a b","ü":"😀"}', NULL, '2999-01-02 03:04:05.000006', '{}');
INSERT INTO sessions (`app_name`, `user_id`, `id`, `state`, `create_time`, `update_time`, `title`, `labels`, `archive_time`, `expire_time`, `initial_state`) VALUES ('shop', 'Ann', 's1', '{"unicode":"¿Qué? “ü” é 👩‍👩‍👧   \\\\ \\" '' %s {} ;\\n\\t","":"empty key","numbers":[0,-1,0.1,1000000000000000.0,9007199254740993,10000000000000000000000000000000000000000,5e-324],"others":[null,true,false,"1","null",{},[],{"a":{"b":[[]]}}],"nan":"adk_sessions:float:nan","infinity":"adk_sessions:float:-inf","minus zero":"adk_sessions:float:-0.0","large":"adk_sessions:float:1e+16","NUL":"adk_sessions:text:a%00b","surrogate":"adk_sessions:text:%ED%A0%80","mark":"adk_sessions:text:adk_sessions%3A"}', '2026-01-02 03:04:05.000006', '2026-01-02 03:04:05.250006', NULL, NULL, NULL, NULL, NULL);
INSERT INTO sessions (`app_name`, `user_id`, `id`, `state`, `create_time`, `update_time`, `title`, `labels`, `archive_time`, `expire_time`, `initial_state`) VALUES ('shop', 'ann', 's1', '{"cart":["tea"]}', '2026-01-02 03:04:05.000006', '2026-01-02 03:04:16.000006', NULL, NULL, NULL, NULL, NULL);
INSERT INTO sessions (`app_name`, `user_id`, `id`, `state`, `create_time`, `update_time`, `title`, `labels`, `archive_time`, `expire_time`, `initial_state`) VALUES ('shop', 'bøb 😀', 's 2 ', '{}', '2026-01-02 03:04:05.000006', '2026-01-02 03:04:05.000006', NULL, NULL, NULL, NULL, NULL);
INSERT INTO events (`id`, `app_name`, `user_id`, `session_id`, `invocation_id`, `timestamp`, `event_data`, `event_exact`) VALUES ('e1', 'shop', 'Ann', 's1', 'call-e1', '2026-01-02 03:04:05.250006', '{"id":"e1","invocation_id":"call-e1","author":"user","timestamp":1767323045.250006,"content":{"role":"user","parts":[{"text":"hello"},{"text":"¿Qué? “ü” é 👩‍👩‍👧   \\\\ \\" '' %s {} ;\\n\\t"}]},"actions":{"state_delta":{"app:currency":"€","cart":["tea"]},"artifact_delta":{}}}', NULL);
INSERT INTO events (`id`, `app_name`, `user_id`, `session_id`, `invocation_id`, `timestamp`, `event_data`, `event_exact`) VALUES ('e1', 'shop', 'ann', 's1', 'call-e1', '2026-01-02 03:04:05.250006', '{"id":"e1","invocation_id":"call-e1","author":"user","timestamp":1767323045.250006,"content":{"role":"user","parts":[{"text":"hello"},{"text":"¿Qué? “ü” é 👩‍👩‍👧   \\\\ \\" '' %s {} ;\\n\\t"}]},"actions":{"state_delta":{"app:currency":"€","cart":["tea"]},"artifact_delta":{}}}', NULL);
INSERT INTO events (`id`, `app_name`, `user_id`, `session_id`, `invocation_id`, `timestamp`, `event_data`, `event_exact`) VALUES ('e2', 'shop', 'ann', 's1', 'call-e2', '2026-01-02 03:04:06.500006', '{"id":"e2","invocation_id":"call-e2","author":"agent","timestamp":1767323046.500006,"content":{"role":"model","parts":[{"function_call":{"id":"c","name":"find","args":{"x":[1,null,{}]}}}]},"actions":{"state_delta":{},"artifact_delta":{}},"long_running_tool_ids":["c"],"branch":"root.leaf"}', NULL);
INSERT INTO events (`id`, `app_name`, `user_id`, `session_id`, `invocation_id`, `timestamp`, `event_data`, `event_exact`) VALUES ('e3', 'shop', 'ann', 's1', 'call-e3', '2026-01-02 03:04:07.000006', '{"id":"e3","invocation_id":"call-e3","author":"agent","timestamp":1767323047.000006,"content":{"role":"user","parts":[{"inline_data":{"data":"AP_-","mime_type":"a/b"}}]},"actions":{"state_delta":{},"artifact_delta":{}}}', NULL);
INSERT INTO events (`id`, `app_name`, `user_id`, `session_id`, `invocation_id`, `timestamp`, `event_data`, `event_exact`) VALUES ('e4', 'shop', 'ann', 's1', 'call-e4', '2026-01-02 03:04:07.000007', '{"id":"e4","invocation_id":"call-e4","author":"user","timestamp":1767319445.000006,"content":{"role":"user","parts":[{"text":"earlier"}]},"actions":{"state_delta":{},"artifact_delta":{}},"turn_complete":true}', NULL);
INSERT INTO events (`id`, `app_name`, `user_id`, `session_id`, `invocation_id`, `timestamp`, `event_data`, `event_exact`) VALUES ('n1', 'notes', 'ann', 's1', 'call-n1', '2026-01-02 03:04:05.000007', '{"id":"n1","invocation_id":"call-n1","author":"user","timestamp":1767323045.000006,"content":"a string","actions":{"state_delta":{},"artifact_delta":{}}}', NULL);
INSERT INTO events (`id`, `app_name`, `user_id`, `session_id`, `invocation_id`, `timestamp`, `event_data`, `event_exact`) VALUES ('n2', 'notes', 'ann', 's1', 'call-n2', '2026-01-02 03:04:06.000006', '{"id":"n2","invocation_id":"call-n2","author":"user","timestamp":1767323046.000006,"content":[1,0.5,null,true,{"k":["v"]}],"actions":{"state_delta":{},"artifact_delta":{}},"custom":{"any":"field"}}', NULL);
INSERT INTO events (`id`, `app_name`, `user_id`, `session_id`, `invocation_id`, `timestamp`, `event_data`, `event_exact`) VALUES ('n3', 'notes', 'ann', 's1', 'call-n3', '2026-01-02 03:04:07.000006', '{"id":"n3","invocation_id":"call-n3","author":"user","timestamp":1767323047.000006,"content":null,"actions":{"state_delta":{},"artifact_delta":{}},"custom_metadata":{"labels":["a",null]}}', NULL);
INSERT INTO events (`id`, `app_name`, `user_id`, `session_id`, `invocation_id`, `timestamp`, `event_data`, `event_exact`) VALUES ('n4', 'notes', 'ann', 's1', 'call-n4', '2026-01-02 03:04:08.000006', '{"id":"n4","invocation_id":"call-n4","author":"user","timestamp":1767323048.000006,"content":"adk_sessions:","actions":{"state_delta":{"plain":"text"},"artifact_delta":{}}}', NULL);
INSERT INTO events (`id`, `app_name`, `user_id`, `session_id`, `invocation_id`, `timestamp`, `event_data`, `event_exact`) VALUES ('x1', 'shop', 'ann', 's1', 'call-x1', '2026-01-02 03:04:15.000006', '{"id":"x1","invocation_id":"call-x1","author":"user","timestamp":1767323055.000006,"content":{"role":"user","parts":[{"text":"a�b"}]},"actions":{"state_delta":{"app:limit":null},"artifact_delta":{}}}', '{"id":"x1","invocation_id":"call-x1","author":"user","timestamp":1767323055.000006,"content":{"role":"user","parts":[{"text":"adk_sessions:text:a%00b"}]},"actions":{"state_delta":{"app:limit":"adk_sessions:float:-inf"},"artifact_delta":{}}}');
INSERT INTO events (`id`, `app_name`, `user_id`, `session_id`, `invocation_id`, `timestamp`, `event_data`, `event_exact`) VALUES ('x2', 'shop', 'ann', 's1', 'call-x2', '2026-01-02 03:04:16.000006', '{"id":"x2","invocation_id":"call-x2","author":"agent","timestamp":1767323056.000006,"content":{"role":"user","parts":[{"text":"half�"}]},"actions":{"state_delta":{},"artifact_delta":{}}}', '{"id":"x2","invocation_id":"call-x2","author":"agent","timestamp":1767323056.000006,"content":{"role":"user","parts":[{"text":"adk_sessions:text:half%ED%A0%80"}]},"actions":{"state_delta":{},"artifact_delta":{}}}');
INSERT INTO app_states (`app_name`, `state`, `update_time`) VALUES ('notes', '{}', '2026-01-02 03:04:05.000006');
INSERT INTO app_states (`app_name`, `state`, `update_time`) VALUES ('shop', '{"currency":"€","limit":"adk_sessions:float:-inf"}', '2026-01-02 03:04:05.000006');
INSERT INTO user_states (`app_name`, `user_id`, `state`, `update_time`) VALUES ('notes', 'ann', '{"name":"Ann at notes"}', '2026-01-02 03:04:05.000006');
INSERT INTO user_states (`app_name`, `user_id`, `state`, `update_time`) VALUES ('shop', 'Ann', '{"name":"another Ann","seen":[1,2]}', '2026-01-02 03:04:05.000006');
INSERT INTO user_states (`app_name`, `user_id`, `state`, `update_time`) VALUES ('shop', 'ann', '{"name":"Ann"}', '2026-01-02 03:04:05.000006');
INSERT INTO user_states (`app_name`, `user_id`, `state`, `update_time`) VALUES ('shop', 'bøb 😀', '{}', '2026-01-02 03:04:05.000006');
INSERT INTO state_changes (`app_name`, `user_id`, `session_id`, `revision`, `number`, `change_time`, `delta`, `deleted`) VALUES ('notes', 'ann', 's1', '2026-01-02 03:04:05.000007', '1', '2026-01-02 03:04:05.000007', '{"nan":"adk_sessions:float:nan"}', '{"draft":true}');
INSERT INTO adk_sessions_version (`version_num`) VALUES ('0005');
