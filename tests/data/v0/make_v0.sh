#!/bin/sh
# One release on one database: ./make_v0.sh PYTHON RELEASE ZONE KIND DRIVER
# PYTHON is that of an environment with the release. Servers listen at 127.0.0.1.
set -eu
python=$1 release=$2 TZ=$3 kind=$4 driver=$5
export TZ
name=$release-$kind
case $kind in
sqlite)
    file=$(mktemp -u).db
    "$python" make_v0.py "$driver:///$file" "$name"
    rm -f "$file" ;;
postgresql)
    psql -q -h 127.0.0.1 -U postgres -c 'DROP DATABASE IF EXISTS make_v0' -c 'CREATE DATABASE make_v0'
    "$python" make_v0.py "$driver://postgres@127.0.0.1:5432/make_v0" "$name"
    pg_dump -h 127.0.0.1 -U postgres --inserts --no-owner --no-privileges make_v0 |
        grep -v -e '^--' -e '^SET ' -e '^SELECT pg_catalog.set' -e '^\\' -e '^$' |
        sed 's/\bpublic\.//g' > "$name.sql"
    psql -q -h 127.0.0.1 -U postgres -c 'DROP DATABASE make_v0' ;;
mariadb)
    mariadb -h 127.0.0.1 -u root -e 'DROP DATABASE IF EXISTS make_v0; CREATE DATABASE make_v0'
    "$python" make_v0.py "$driver://root@127.0.0.1:3306/make_v0?charset=utf8mb4" "$name"
    # parents first
    mariadb-dump -h 127.0.0.1 -u root --compact --skip-extended-insert --hex-blob --skip-opt \
        --create-options make_v0 app_states user_states sessions events |
        grep -v -e '^/\*' > "$name.sql"
    mariadb -h 127.0.0.1 -u root -e 'DROP DATABASE make_v0' ;;
esac
