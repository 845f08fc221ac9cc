#!/bin/sh
# Image "redis": every acknowledged write is on disk.
set -eu
chown redis:redis /data
exec /usr/bin/setpriv --reuid=redis --regid=redis --clear-groups \
    redis-server --dir /data --appendonly yes --appendfsync always --save "" --protected-mode no
