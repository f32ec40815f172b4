#!/usr/bin/env bash
# A Kafka broker of your own on this machine: one process in KRaft mode, on 127.0.0.1 alone.
#
#   scripts/kafka.sh up     [--port 9092] [--dir DIR] [--proxied PORT=HOST:PORT]
#   scripts/kafka.sh topics [--port 9092] [--partitions 8]
#   scripts/kafka.sh send   [--port 9092] [--topic ingest-spans]
#   scripts/kafka.sh read   [--port 9092] [--topic buffered-segments]
#   scripts/kafka.sh status [--dir DIR]
#   scripts/kafka.sh down   [--dir DIR]
#   scripts/kafka.sh run    [--port 9092] [--dir DIR] [--proxied PORT=HOST:PORT]
#
# `topics` makes the four topics that Spanbuf's configuration names where none is given, the input and the output with that many
# partitions.
# `send` sends each line of its input as a message. `read` prints a topic from its beginning, a line a message, until it is interrupted.
# `run` stays in the foreground, ends with its terminal or its parent, and goes on with the data of an earlier `run` in DIR.
# --dir      logs, data and the pid; made by `up`, removed by `down`. Default: $SPANBUF_KAFKA_DIR, or spanbuf-kafka-<uid> in
#            the system's temp directory.
# --proxied  a second port, whose clients are told to connect to HOST:PORT: the address of a proxy before it.
#
# The first `up` loads the broker by maven (93 jars, 54 MB) into ${SPANBUF_CACHE:-~/.cache/spanbuf}.
set -euo pipefail

VERSION=4.1.0
SCALA=2.13
SLF4J=1.7.36
HEAP=-Xmx512m
START_SECONDS=60
STOP_SECONDS=20
# In every directory that `up` makes: `down` removes no other.
MARK=spanbuf-kafka

say() { printf 'kafka.sh: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
usage() { sed -n '2,/^set/p' "$0" | sed -n 's/^# \{0,1\}//p' >&2; exit 64; }

need() { # program package
  command -v "$1" >/dev/null && return
  say "$1 is missing: apt-get install $2"
  local root=()
  if [ "$(id -u)" != 0 ]; then root=(sudo); fi
  DEBIAN_FRONTEND=noninteractive "${root[@]}" apt-get install -y --no-install-recommends "$2" >&2 ||
    die "cannot install $2 (install it by hand: apt-get update && apt-get install $2)"
}

load_jars() {
  [ -f "$CACHE/jars/kafka_$SCALA-$VERSION.jar" ] && return
  need java default-jre-headless
  need mvn maven
  say "loading kafka $VERSION into $CACHE"
  mkdir -p "$(dirname "$CACHE")"
  # Another `up` may load at the same time: each loads into a directory of its own, and the first to end puts it in place.
  local work
  work=$(mktemp -d "$CACHE.XXXXXX")
  # shellcheck disable=SC2064
  trap "rm -rf '$work'" EXIT
  cat >"$work/pom.xml" <<POM
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>spanbuf</groupId><artifactId>kafka</artifactId><version>1</version>
  <dependencies>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_$SCALA</artifactId><version>$VERSION</version></dependency>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka-tools</artifactId><version>$VERSION</version></dependency>
    <dependency><groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>$SLF4J</version></dependency>
  </dependencies>
</project>
POM
  mvn -q -B -Dstyle.color=never -f "$work/pom.xml" dependency:copy-dependencies -DoutputDirectory="$work/jars" >&2 ||
    die "cannot load kafka (check the network and maven's settings)"
  if ! mv -T "$work" "$CACHE" 2>/dev/null; then
    [ -f "$CACHE/jars/kafka_$SCALA-$VERSION.jar" ] || die "cannot put kafka into $CACHE (remove it and try again)"
  fi
  rm -rf "$work"
  trap - EXIT
}

# A port that nobody listens on at this moment.
free_port() {
  local port
  while :; do
    port=$((20000 + RANDOM % 12000))
    answers "$port" || break
  done
  echo "$port"
}

# The subshell closes the connection.
answers() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

run_tool() { java -Xmx64m -Dorg.slf4j.simpleLogger.defaultLogLevel=warn -cp "$CACHE/jars/*" "$@"; }

write_config() {
  local controller listeners advertised map
  controller=$(free_port)
  listeners="BROKER://127.0.0.1:$PORT,CONTROLLER://127.0.0.1:$controller"
  advertised="BROKER://127.0.0.1:$PORT,CONTROLLER://127.0.0.1:$controller"
  map="BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT"
  if [ -n "$PROXIED" ]; then
    listeners+=",PROXIED://127.0.0.1:${PROXIED%%=*}"
    advertised+=",PROXIED://${PROXIED#*=}"
    map+=",PROXIED:PLAINTEXT"
  fi
  cat >"$DIR/server.properties" <<PROPERTIES
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:$controller
controller.listener.names=CONTROLLER
inter.broker.listener.name=BROKER
listeners=$listeners
advertised.listeners=$advertised
listener.security.protocol.map=$map
log.dirs=$DIR/data
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
PROPERTIES
}

# Whether the pid file's process is still the broker of this directory.
is_ours() {
  local pid
  pid=$(cat "$DIR/pid" 2>/dev/null) && [ -r "/proc/$pid/cmdline" ] &&
    tr '\0' '\n' <"/proc/$pid/cmdline" | grep -qxF "$DIR/server.properties"
}

check() {
  if is_ours; then die "a broker runs in $DIR already, pid $(cat "$DIR/pid") (scripts/kafka.sh down --dir $DIR)"; fi
  if answers "$PORT"; then die "port $PORT is taken (choose another: --port)"; fi
  if [ -e "$DIR" ] && [ ! -f "$DIR/$MARK" ]; then die "$DIR exists and is not of this script (choose another: --dir)"; fi
  need java default-jre-headless
  load_jars
}

format() {
  mkdir -p "$DIR"
  touch "$DIR/$MARK"
  write_config
  local id
  id=$(run_tool kafka.tools.StorageTool random-uuid 2>/dev/null)
  run_tool kafka.tools.StorageTool format -t "$id" -c "$DIR/server.properties" >"$DIR/format.log" 2>&1 ||
    die "cannot format $DIR: $(tail -3 "$DIR/format.log")"
}

run() {
  check
  [ -f "$DIR/data/meta.properties" ] || format
  echo $$ >"$DIR/pid"
  exec java "${BROKER[@]}" </dev/null
}

up() {
  check
  rm -rf "$DIR"
  format
  # A session of its own: neither the terminal's interrupt nor its end reaches the broker.
  setsid java "${BROKER[@]}" </dev/null >"$DIR/kafka.log" 2>&1 &
  echo $! >"$DIR/pid"
  await_start
  say "up at 127.0.0.1:$PORT, pid $(cat "$DIR/pid"), directory $DIR"
}

await_start() {
  local deadline=$((SECONDS + START_SECONDS))
  # A broker whose port is open may not answer yet: the answer to a question about its metadata counts.
  until run_tool org.apache.kafka.tools.BrokerApiVersionsCommand --bootstrap-server "127.0.0.1:$PORT" \
    >"$DIR/answer.log" 2>&1; do
    kill -0 "$(cat "$DIR/pid")" 2>/dev/null || die "the broker ended: $(tail -20 "$DIR/kafka.log")"
    [ "$SECONDS" -lt "$deadline" ] || { stop; die "no answer within $START_SECONDS s: $(tail -20 "$DIR/kafka.log")"; }
  done
}

# TERM, and KILL for one that does not stop.
stop() {
  is_ours || return 0
  local pid deadline=$((SECONDS + STOP_SECONDS))
  pid=$(cat "$DIR/pid")
  kill "$pid" 2>/dev/null || true
  while is_ours; do
    if [ "$SECONDS" -ge "$deadline" ]; then
      say "pid $pid does not stop: killed"
      kill -KILL "$pid" 2>/dev/null || true
      deadline=$((SECONDS + STOP_SECONDS))
    fi
    sleep 0.1
  done
}

down() {
  stop
  # Nothing that this script did not make.
  if [ -f "$DIR/$MARK" ]; then rm -rf "$DIR"; fi
}

need_broker() {
  answers "$PORT" || die "no broker at 127.0.0.1:$PORT (scripts/kafka.sh up --port $PORT)"
  need java default-jre-headless
  load_jars
}

send() {
  need_broker
  run_tool org.apache.kafka.tools.ConsoleProducer --bootstrap-server "127.0.0.1:$PORT" --topic "${TOPIC:-ingest-spans}"
}

read_topic() {
  need_broker
  run_tool org.apache.kafka.tools.consumer.ConsoleConsumer --bootstrap-server "127.0.0.1:$PORT" --from-beginning \
    --topic "${TOPIC:-buffered-segments}"
}

topics() {
  need_broker
  topic ingest-spans "$PARTITIONS"
  topic ingest-spans-dlq 1
  topic buffered-segments "$PARTITIONS" max.message.bytes=11534336
  topic buffered-segments-dlq 1 max.message.bytes=104857600
}

topic() { # name partitions [setting]
  run_tool org.apache.kafka.tools.TopicCommand --bootstrap-server "127.0.0.1:$PORT" --create --if-not-exists \
    --topic "$1" --partitions "$2" ${3:+--config "$3"} >&2 || die "cannot make topic $1"
}

status() {
  if is_ours; then
    say "runs, pid $(cat "$DIR/pid"), $(grep '^listeners=' "$DIR/server.properties")"
  else
    say "no broker runs in $DIR"
    return 1
  fi
}

ORDER=${1:-}
[ $# -gt 0 ] && shift
PORT=9092
PARTITIONS=8
PROXIED=
TOPIC=
DIR=${SPANBUF_KAFKA_DIR:-${TMPDIR:-/tmp}/spanbuf-kafka-$(id -u)}
while [ $# -gt 0 ]; do
  [ $# -ge 2 ] || usage
  case $1 in
    --port) PORT=$2 ;;
    --dir) DIR=$2 ;;
    --partitions) PARTITIONS=$2 ;;
    --proxied) PROXIED=$2 ;;
    --topic) TOPIC=$2 ;;
    *) usage ;;
  esac
  shift 2
done
case $DIR in /*) ;; *) DIR=$PWD/$DIR ;; esac
CACHE=${SPANBUF_CACHE:-$HOME/.cache/spanbuf}/kafka-$VERSION
BROKER=("$HEAP" -cp "$CACHE/jars/*" -Dorg.slf4j.simpleLogger.defaultLogLevel=warn kafka.Kafka "$DIR/server.properties")

case $ORDER in
  run) run ;;
  up) up ;;
  down) down ;;
  topics) topics ;;
  send) send ;;
  read) read_topic ;;
  status) status ;;
  *) usage ;;
esac
