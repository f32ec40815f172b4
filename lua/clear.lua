-- Removes from one journal the entries that were produced or dropped, counts them, and queues what is left.
--
-- KEYS    1 journal (hash), 2 queue (sorted set), 3 sum (hash); all with one hash tag
-- ARGV    1 TTL of the journal, milliseconds
--         2 TTL of queue and sum, milliseconds
--         3 the trace's member in the queue
--         4 its next look, shard clock, milliseconds; empty: whoever inserted what is left has queued it
--         then for each field to remove: field, spans produced, repeats, number of reasons, and for each of these: reason, spans dropped
-- RETURNS 1 fields that this call removed
--         2 fields that are left
--         3 the member's score afterwards; empty: it is in the queue no more
-- KEEPS   the sum gets the amounts of exactly the fields that this call removed, so a repeat adds nothing;
--         a journal that holds anything is in the queue, no later than its next look
-- COST    three keys; one HDEL for each field

assert(#KEYS == 3 and #ARGV >= 4, 'clear.lua: 3 keys and at least 4 arguments expected')

local fields = 5
while fields <= #ARGV do
  local reasons = tonumber(ARGV[fields + 3])
  assert(reasons and reasons >= 0 and fields + 3 + 2 * reasons <= #ARGV, 'clear.lua: a field lacks its amounts')
  fields = fields + 4 + 2 * reasons
end

-- First write of all: EXPIRE is allowed on a full server, and lets the writes after it pass.
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('PEXPIRE', KEYS[2], ARGV[2])

-- In a slot that is on its way to another node, nothing may touch a key that is no more: neither the journal that its last field
-- has left, nor the queue that its last member has.
local left = redis.call('HLEN', KEYS[1])
local removed = 0
local sums = {}
local function add(name, amount)
  if amount > 0 then
    sums[name] = (sums[name] or 0) + amount
  end
end

local at = 5
while at <= #ARGV do
  local reasons = tonumber(ARGV[at + 3])
  if left > 0 and redis.call('HDEL', KEYS[1], ARGV[at]) == 1 then
    removed = removed + 1
    left = left - 1
    add('produced', tonumber(ARGV[at + 1]))
    add('repeats', tonumber(ARGV[at + 2]))
    for reason = at + 4, at + 3 + 2 * reasons, 2 do
      add('dropped:' .. ARGV[reason], tonumber(ARGV[reason + 1]))
    end
  end
  at = at + 4 + 2 * reasons
end

local score = ''
if left == 0 then
  redis.call('ZREM', KEYS[2], ARGV[3])
else
  if ARGV[4] ~= '' then
    redis.call('ZADD', KEYS[2], 'LT', ARGV[4], ARGV[3])
  end
  redis.call('PEXPIRE', KEYS[2], ARGV[2])
  score = redis.call('ZSCORE', KEYS[2], ARGV[3]) or ''
end
for name, amount in pairs(sums) do
  redis.call('HINCRBY', KEYS[3], name, string.format('%.0f', amount))
end
redis.call('PEXPIRE', KEYS[3], ARGV[2])
return {removed, left, score}
