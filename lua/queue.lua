-- Lifts or lowers the scores of many traces in one queue.
--
-- KEYS    1 queue (sorted set)
-- ARGV    1 TTL of the queue, milliseconds
--         2 `lift`: only members that are there, to any score; `lower`: added when missing, never to a higher score
--         3, 4, … pairs of score (shard clock, milliseconds) and member
-- RETURNS members added or changed
-- KEEPS   lifting adds nobody; lowering raises nobody
-- COST    one key; one ZADD for each 2,000 members

assert(#KEYS == 1 and #ARGV >= 2 and #ARGV % 2 == 0, 'queue.lua: 1 key, 2 arguments and pairs expected')
local how = ({lift = 'XX', lower = 'LT'})[ARGV[2]]
assert(how, 'queue.lua: the second argument is lift or lower')

-- First of all: EXPIRE is allowed on a full server, and lets the writes after it pass.
redis.call('PEXPIRE', KEYS[1], ARGV[1])
local changed = 0
-- Lua passes some 8,000 arguments at most.
for first = 3, #ARGV, 4000 do
  changed = changed + redis.call('ZADD', KEYS[1], how, 'CH', unpack(ARGV, first, math.min(first + 3999, #ARGV)))
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return changed
