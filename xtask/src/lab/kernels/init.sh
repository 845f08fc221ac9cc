#!/bin/busybox sh
# First process of a guest: sets up, runs the tests, asks the agent, says the results, powers off.
export PATH=/bin RUST_BACKTRACE=0 LIFEBOAT_GUEST=1
/bin/busybox --install -s /bin 2>/dev/null
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmpfs /run; mount -t tmpfs tmpfs /tmp
mkdir -p /sys/fs/cgroup /run/netns; mount -t cgroup2 cgroup2 /sys/fs/cgroup
ip link set lo up
for module in @MODULES@; do modprobe $module || echo "init: no module $module"; done
mkdir -p @WORK@ && mount -t ext4 /dev/vda @WORK@ || echo "init: no disk"
echo "guest: kernel $(uname -r)"
for test in @TESTS@; do
  $test --test-threads=1 --show-output 2>&1
  echo "guest: $test ended with $?"
  killall -q lifeboat
done
echo "device: guest
state: /run/state
socket: /run/agent.sock
runtimes: []" > /run/agent.yaml
observe() {
  lifeboat agent --config /run/agent.yaml & agent=$!
  n=0; while [ $n -lt 60 ]; do status=$(lifeboat --json --socket /run/agent.sock status 2>/dev/null) && case "$status" in *'"at":0,'*) ;; *) break ;; esac; n=$((n+1)); sleep 0.5; done
  echo "guest: $1 $status"
  kill $agent; wait $agent
}
observe whole
mount --bind /dev/null /sys/kernel/btf/vmlinux
observe without-btf
echo "guest: done"
poweroff -f
