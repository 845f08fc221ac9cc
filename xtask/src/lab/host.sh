# Body of a lab host's first process. It arrives in fresh mount, network, UTS and cgroup namespaces and
# builds the host's view over the machine's root file system; the shell then stays as the process that
# keeps the namespaces alive. In: HOST_NAME, HOST_DIR (on a real disk), WORKSPACE.
set -eu
cd "$WORKSPACE"

# Overlays: the host may write to /etc and /var, and mount points missing on the machine can be made,
# without a trace on the machine. Prepared before the tmpfs on /tmp, which may hide HOST_DIR.
for dir in etc var; do
    mkdir -p "$HOST_DIR/$dir/upper" "$HOST_DIR/$dir/work"
done
mkdir -p "$HOST_DIR/containers" "$HOST_DIR/lifeboat" "$HOST_DIR/srv" "$HOST_DIR/logs"
# volatile: nothing of a lab has to survive, and without it the last unmount would sync the whole disk.
mount -t overlay overlay -o "volatile,lowerdir=/etc,upperdir=$HOST_DIR/etc/upper,workdir=$HOST_DIR/etc/work" /etc
mount -t tmpfs -o mode=755 stage /mnt
mkdir /mnt/containers /mnt/lifeboat /mnt/srv
for dir in containers lifeboat srv; do
    mount --bind "$HOST_DIR/$dir" /mnt/$dir
done
mount -t overlay overlay -o "volatile,lowerdir=/var,upperdir=$HOST_DIR/var/upper,workdir=$HOST_DIR/var/work" /var
mkdir -p /var/lib/containers /var/lib/lifeboat /etc/lifeboat /etc/containers
cp "$HOST_DIR/hosts" /etc/hosts
cp "$HOST_DIR/containers.conf" /etc/containers/containers.conf
echo "$HOST_NAME" >/etc/hostname
# Answers "port unreachable" at once; without a server here Podman would hand out public ones.
rm -f /etc/resolv.conf
echo "nameserver 10.77.0.1" >/etc/resolv.conf
# Podman's overlay storage cannot lie on an overlay: it gets the real disk.
mount --move /mnt/containers /var/lib/containers
mount --move /mnt/lifeboat /var/lib/lifeboat
mount --move /mnt/srv /srv
umount /mnt
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=1777 tmp /tmp
# Podman's lock file lives here and must not be shared between hosts.
mount -t tmpfs -o mode=1777 shm /dev/shm
mkdir -p /run/lock /run/podman "$WORKSPACE"
# Relative on purpose: the working directory still is the workspace even if a mount above hides its path.
mount --no-canonicalize --bind . "$WORKSPACE"

# Only this mount namespace: without the machine's cgroup mounts nobody inside can take the wrong hierarchy.
umount --recursive --lazy /sys
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
# Controllers can only be handed to children when no process sits in the subtree's root itself.
mkdir -p /sys/fs/cgroup/init
echo $$ >/sys/fs/cgroup/init/cgroup.procs
mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null || true
mount -t bpf bpf /sys/fs/bpf 2>/dev/null || true

hostname "$HOST_NAME"
ip link set lo up
echo 1 >/proc/sys/net/ipv4/ip_forward

touch /run/lab-ready
exec sleep infinity
