#!/bin/sh
# Image "postgres": makes the cluster on the first start, then runs the server as an unprivileged user.
# Programs by path: busybox's shell would take its own applets first.
set -eu
home=/var/lib/postgresql/data
as_postgres="/usr/bin/setpriv --reuid=postgres --regid=postgres --clear-groups"
bin=$(echo /usr/lib/postgresql/*/bin)
chown postgres:postgres "$home"
if [ ! -d "$home/main" ]; then
    # Made aside and renamed: a start that was interrupted leaves no half cluster.
    rm -rf "$home/new"
    $as_postgres "$bin/initdb" --pgdata="$home/new" --username=postgres --auth=trust --encoding=UTF8 --locale=C
    echo "host all all all trust" >>"$home/new/pg_hba.conf"
    mv "$home/new" "$home/main"
fi
exec $as_postgres "$bin/postgres" -D "$home/main" -c listen_addresses='*' -c unix_socket_directories=/tmp -c shared_buffers=32MB
