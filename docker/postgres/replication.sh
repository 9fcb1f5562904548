#!/bin/sh
# Runs once in a new primary: the role that the archiver streams with.
set -eu
psql --username "$POSTGRES_USER" --command "CREATE ROLE tidemark LOGIN REPLICATION PASSWORD 'tidemark' IN ROLE pg_monitor"
echo 'host replication tidemark all scram-sha-256' >> "$PGDATA/pg_hba.conf"
