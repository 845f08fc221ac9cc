#!/bin/sh
# Image "nginx": a front that asks for the service's address again when it moved.
set -eu
resolver=$(sed -n 's/^nameserver //p' /etc/resolv.conf | head -n 1)
cat >/etc/nginx/nginx.conf <<CONF
daemon off;
error_log /dev/stderr warn;
events { worker_connections 512; }
http {
    access_log off;
    resolver $resolver valid=1s ipv6=off;
    proxy_connect_timeout 2s;
    server {
        listen 80;
        listen [::]:80;
        location / {
            set \$service http://app:8000;
            proxy_pass \$service;
        }
    }
}
CONF
exec nginx
