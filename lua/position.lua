-- Moves the position of one bucket on, if nobody else did.
--
-- KEYS    1 position (hash), 2 queue (sorted set), 3 sum (hash); all with one hash tag
-- ARGV    1 TTL of the keys, milliseconds
--         2 the `next` that has to stand now, decimal; empty: no position has to stand
--         3 the new `next`: the offset below which the bucket holds everything, decimal
--         4 shard clock, milliseconds
--         5 spans that this step makes visible
--         6 instance id of the store
--         then pairs: counter of the sum, and what this step adds to it
-- RETURNS 1 whether it was written: 1 or 0
--         2 the `next` that stands afterwards; empty: none
-- KEEPS   a position is written once for each step: a repeat finds its own value standing and adds nothing
-- COST    three keys touched, one written; one HINCRBY for each pair

assert(#KEYS == 3 and #ARGV >= 6 and #ARGV % 2 == 0, 'position.lua: 3 keys, 6 arguments and pairs expected')

-- First of all: EXPIRE is allowed on a full server, and lets the writes after it pass.
redis.call('PEXPIRE', KEYS[2], ARGV[1])
redis.call('PEXPIRE', KEYS[3], ARGV[1])
local stands = redis.call('HGET', KEYS[1], 'next') or ''
if stands ~= ARGV[2] then
  redis.call('PEXPIRE', KEYS[1], ARGV[1])
  return {0, stands}
end
-- What may fail comes first: a position that is no position does not move.
redis.call('HINCRBY', KEYS[1], 'spans', ARGV[5])
redis.call('HSET', KEYS[1], 'next', ARGV[3], 'clock', ARGV[4], 'instance', ARGV[6])
for pair = 7, #ARGV, 2 do
  redis.call('HINCRBY', KEYS[3], ARGV[pair], ARGV[pair + 1])
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('PEXPIRE', KEYS[3], ARGV[1])
return {1, ARGV[3]}
