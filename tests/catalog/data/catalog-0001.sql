PRAGMA application_id = 1163415635;
BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
CREATE TABLE aliases (
	project TEXT NOT NULL, 
	alias TEXT NOT NULL, 
	record INTEGER NOT NULL, 
	claimed_at BIGINT NOT NULL, 
	CONSTRAINT pk_aliases PRIMARY KEY (project, alias), 
	CONSTRAINT fk_aliases_record FOREIGN KEY(record) REFERENCES records (seq) ON DELETE CASCADE
);
INSERT INTO "aliases" VALUES('vision','best',2,1767225600000003);
CREATE TABLE bodies (
	record INTEGER NOT NULL, 
	body TEXT NOT NULL, 
	annotations TEXT, 
	CONSTRAINT pk_bodies PRIMARY KEY (record), 
	CONSTRAINT fk_bodies_record FOREIGN KEY(record) REFERENCES records (seq) ON DELETE CASCADE
);
INSERT INTO "bodies" VALUES(1,'{"tags":["ablation","für immer"],"note":"A record of the first version.\nIt must be readable for ever.","params":{"lr":0.1,"layers":[4,{"type":"tuple","value":[2,null]}],"huge":{"type":"int","value":"0x400000000000000000"},"optimizer":"adam","amp":true,"nothing":null},"metrics":{"loss":0.25,"diverged":{"type":"float","value":"7ff8000000000000"},"steps":1152921504606846977},"keys":[{"key":"model","type":"torch.nn.modules.linear.Linear","tensors":2,"nbytes":80},{"key":"progress","type":"expstate.state.stateful.StateDict","tensors":0,"nbytes":0}],"provenance":{"host":"node-1","git":{"commit":"cccccccccccccccccccccccccccccccccccccccc","branch":"main","dirty":true},"run":{"argv":["train.py","-v"]}}}',NULL);
INSERT INTO "bodies" VALUES(2,'{"tags":["ablation"],"metrics":{"loss":0.125}}','{"format":1,"id":"22222222222222222222222222222222","tags":{"kept":[1767225600000001,true],"ablation":[1767225600000002,false]},"aliases":{"best":[1767225600000003,true],"worst":[1767225600000004,false]},"pin":[1767225600000005,true],"note":[1767225600000006,"changed since"],"metrics":{"acc":[1767225600000007,0.75]}}');
INSERT INTO "bodies" VALUES(3,'{}',NULL);
CREATE TABLE environments (
	digest VARCHAR(64) NOT NULL, 
	packages TEXT NOT NULL, 
	CONSTRAINT pk_environments PRIMARY KEY (digest)
);
INSERT INTO "environments" VALUES('bc78190afc4de3eb029598216d280d1ba09dd312c4a6e63501d852a7b67023e0','{"numpy":"2.4.6","torch":"2.13.0"}');
CREATE TABLE locations (
	record INTEGER NOT NULL, 
	place VARCHAR(64) NOT NULL, 
	url TEXT NOT NULL, 
	host TEXT NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	status TEXT NOT NULL, 
	seen_at BIGINT NOT NULL, 
	CONSTRAINT pk_locations PRIMARY KEY (record, place), 
	CONSTRAINT fk_locations_record FOREIGN KEY(record) REFERENCES records (seq) ON DELETE CASCADE
);
INSERT INTO "locations" VALUES(1,'5f451f658aacf38cfb94a3de1ce25fe47061c9d0c67036bb1759ba760e34b03d','/runs/1','node-1','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','present',1767225600000000);
INSERT INTO "locations" VALUES(2,'11e6e7750abb6df8c6d98ff75f162ed14717774f2941659deb4b6b9fb15847eb','/runs/2','node-1','bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb','present',1767312000000000);
INSERT INTO "locations" VALUES(1,'461b44d836050c858abf1e7ba866db7c9ee0553f4276e0139370e4507582d2fc','s3://bucket/1','','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','present',1767225600000000);
INSERT INTO "locations" VALUES(3,'84da8a66a379fd59d50af1f3512e16186402e32f941ed91b3bb5c8da3cda8eb8','/runs/3','node-1','dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd','present',1767139200000000);
CREATE TABLE metrics (
	record INTEGER NOT NULL, 
	name INTEGER NOT NULL, 
	number FLOAT, 
	exact TEXT, 
	CONSTRAINT pk_metrics PRIMARY KEY (record, name), 
	CONSTRAINT fk_metrics_record FOREIGN KEY(record) REFERENCES records (seq) ON DELETE CASCADE, 
	CONSTRAINT fk_metrics_name FOREIGN KEY(name) REFERENCES names (id)
)
 WITHOUT ROWID

;
INSERT INTO "metrics" VALUES(1,7,0.25,NULL);
INSERT INTO "metrics" VALUES(1,8,NULL,'nan');
INSERT INTO "metrics" VALUES(1,9,1.15292150460684697597e+18,'1000000000000001');
INSERT INTO "metrics" VALUES(2,7,0.125,NULL);
INSERT INTO "metrics" VALUES(2,10,0.75,NULL);
CREATE TABLE names (
	id INTEGER NOT NULL, 
	project TEXT NOT NULL, 
	kind VARCHAR(6) NOT NULL, 
	name TEXT NOT NULL, 
	CONSTRAINT pk_names PRIMARY KEY (id)
);
INSERT INTO "names" VALUES(1,'vision','param','lr');
INSERT INTO "names" VALUES(2,'vision','param','layers');
INSERT INTO "names" VALUES(3,'vision','param','huge');
INSERT INTO "names" VALUES(4,'vision','param','optimizer');
INSERT INTO "names" VALUES(5,'vision','param','amp');
INSERT INTO "names" VALUES(6,'vision','param','nothing');
INSERT INTO "names" VALUES(7,'vision','metric','loss');
INSERT INTO "names" VALUES(8,'vision','metric','diverged');
INSERT INTO "names" VALUES(9,'vision','metric','steps');
INSERT INTO "names" VALUES(10,'vision','metric','acc');
CREATE TABLE params (
	record INTEGER NOT NULL, 
	name INTEGER NOT NULL, 
	number FLOAT, 
	text TEXT, 
	exact TEXT, 
	CONSTRAINT pk_params PRIMARY KEY (record, name), 
	CONSTRAINT fk_params_record FOREIGN KEY(record) REFERENCES records (seq) ON DELETE CASCADE, 
	CONSTRAINT fk_params_name FOREIGN KEY(name) REFERENCES names (id)
)
 WITHOUT ROWID

;
INSERT INTO "params" VALUES(1,1,0.1,NULL,NULL);
INSERT INTO "params" VALUES(1,2,NULL,NULL,NULL);
INSERT INTO "params" VALUES(1,3,1.18059162071741130344e+21,NULL,NULL);
INSERT INTO "params" VALUES(1,4,NULL,'adam',NULL);
INSERT INTO "params" VALUES(1,5,NULL,'true',NULL);
INSERT INTO "params" VALUES(1,6,NULL,NULL,'none');
CREATE TABLE records (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id VARCHAR(32) NOT NULL, 
	project TEXT NOT NULL, 
	name TEXT, 
	user TEXT, 
	host TEXT, 
	step BIGINT, 
	created_at BIGINT NOT NULL, 
	ordered_at BIGINT NOT NULL, 
	duration_seconds FLOAT, 
	nbytes BIGINT NOT NULL, 
	written_bytes BIGINT NOT NULL, 
	world_size INTEGER NOT NULL, 
	parent VARCHAR(32), 
	digest VARCHAR(64) NOT NULL, 
	pinned BOOLEAN NOT NULL, 
	note TEXT, 
	status TEXT NOT NULL, 
	git_commit TEXT, 
	git_branch TEXT, 
	environment VARCHAR(64), 
	CONSTRAINT uq_records_id UNIQUE (id)
);
INSERT INTO "records" VALUES(1,'11111111111111111111111111111111','vision','resnet','ada','node-1',100,1767225600000000,1767225600000000,1.5,80,4176,1,NULL,'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa',0,'A record of the first version.
It must be readable for ever.','present','cccccccccccccccccccccccccccccccccccccccc','main','bc78190afc4de3eb029598216d280d1ba09dd312c4a6e63501d852a7b67023e0');
INSERT INTO "records" VALUES(2,'22222222222222222222222222222222','vision','resnet','ada',NULL,200,1767312000000000,1767312000000000,NULL,80,4176,1,'11111111111111111111111111111111','bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb',1,'changed since','present',NULL,NULL,'bc78190afc4de3eb029598216d280d1ba09dd312c4a6e63501d852a7b67023e0');
INSERT INTO "records" VALUES(3,'33333333333333333333333333333333','speech',NULL,NULL,NULL,NULL,1767139200000000,1767139200000000,NULL,80,4176,8,NULL,'dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd',0,NULL,'present',NULL,NULL,NULL);
CREATE TABLE tags (
	record INTEGER NOT NULL, 
	tag TEXT NOT NULL, 
	CONSTRAINT pk_tags PRIMARY KEY (record, tag), 
	CONSTRAINT fk_tags_record FOREIGN KEY(record) REFERENCES records (seq) ON DELETE CASCADE
)
 WITHOUT ROWID

;
INSERT INTO "tags" VALUES(1,'ablation');
INSERT INTO "tags" VALUES(1,'für immer');
INSERT INTO "tags" VALUES(2,'kept');
CREATE INDEX ix_records_project_ordered_at ON records (project, ordered_at);
CREATE INDEX ix_records_ordered_at ON records (ordered_at);
CREATE INDEX ix_records_parent ON records (parent);
CREATE INDEX ix_records_project_name ON records (project, name);
CREATE UNIQUE INDEX ix_names_project_kind_name ON names (project, kind, name);
CREATE INDEX ix_locations_place ON locations (place);
CREATE INDEX ix_aliases_record ON aliases (record);
CREATE INDEX ix_tags_tag_record ON tags (tag, record);
CREATE INDEX ix_metrics_name_number_record ON metrics (name, number, record);
CREATE INDEX ix_params_name_number_record ON params (name, number, record);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('records',3);
COMMIT;
