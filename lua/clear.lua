-- Removes from journals of one bucket the entries that were produced or dropped, counts them, and queues what is left.
--
-- KEYS    1 queue (sorted set), 2 sum (hash), then a journal (hash) for each trace; all with one hash tag
-- ARGV    1 TTL of a journal, milliseconds
--         2 TTL of queue and sum, milliseconds
--         then for each journal: the trace's member in the queue; its next look, shard clock, milliseconds, empty: whoever inserted
--         what is left has queued it; the number of fields to remove; and for each of these: field, spans produced, repeats, number
--         of reasons, and for each of these: reason, spans dropped
-- RETURNS for each journal two values: fields that this call removed, or the error of a journal that is none;
--         and fields that are left
-- KEEPS   the sum gets the amounts of exactly the fields that this call removed, so a repeat adds nothing;
--         a journal that holds anything is in the queue, no later than its next look; a key of another type keeps back its own
--         trace alone
-- COST    two keys and one for each journal; one HDEL for each field; the caller bounds journals and fields

assert(#KEYS >= 2 and #ARGV >= 2, 'clear.lua: 2 keys and 2 arguments expected')

-- All arguments are looked at before the first write: a call is carried out whole or not at all.
local at = 3
for journal = 3, #KEYS do
  local count = tonumber(ARGV[at + 2])
  assert(count and count >= 0, 'clear.lua: a journal lacks its fields')
  at = at + 3
  for _ = 1, count do
    local reasons = tonumber(ARGV[at + 3])
    assert(tonumber(ARGV[at + 1]) and tonumber(ARGV[at + 2]) and reasons and reasons >= 0, 'clear.lua: a field lacks its amounts')
    at = at + 4 + 2 * reasons
    assert(at <= #ARGV + 1, 'clear.lua: a field lacks its reasons')
  end
end
assert(at == #ARGV + 1, 'clear.lua: arguments without a journal')

-- First write of all: EXPIRE is allowed on a full server, and lets the writes after it pass.
redis.call('PEXPIRE', KEYS[1], ARGV[2])
-- A sum that is none fails the call here, before anything is removed that could not be counted.
redis.call('HLEN', KEYS[2])

local replies = {}
local gone = {}
local lowered = {}
local sums = {}
local function add(name, amount)
  if amount > 0 then
    sums[name] = (sums[name] or 0) + amount
  end
end

at = 3
for place = 3, #KEYS do
  local journal = KEYS[place]
  local member, next_look, count = ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2])
  local removed = 0
  at = at + 3
  -- Counted from here on, not asked: in a slot that is on its way to another node, nothing may touch a key that is no more.
  local left = redis.pcall('HLEN', journal)
  local is_journal = type(left) == 'number'
  for _ = 1, count do
    local reasons = tonumber(ARGV[at + 3])
    if is_journal and left > 0 and redis.call('HDEL', journal, ARGV[at]) == 1 then
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
  if is_journal then
    replies[#replies + 1] = removed
    replies[#replies + 1] = left
    if left == 0 then
      gone[#gone + 1] = member
    else
      redis.call('PEXPIRE', journal, ARGV[1])
      if next_look ~= '' then
        lowered[#lowered + 1] = next_look
        lowered[#lowered + 1] = member
      end
    end
  else
    replies[#replies + 1] = left.err
    replies[#replies + 1] = 0
  end
end

-- What is removed is counted before anything else can fail.
for name, amount in pairs(sums) do
  redis.call('HINCRBY', KEYS[2], name, string.format('%.0f', amount))
end
redis.call('PEXPIRE', KEYS[2], ARGV[2])
-- Lua passes some 8,000 arguments at most. A trace that is named twice may be lowered first and gone then. The last of all may
-- take the queue's last member, and the queue with it.
for first = 1, #lowered, 4000 do
  redis.call('ZADD', KEYS[1], 'LT', unpack(lowered, first, math.min(first + 3999, #lowered)))
end
if #lowered > 0 then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
for first = 1, #gone, 4000 do
  redis.call('ZREM', KEYS[1], unpack(gone, first, math.min(first + 3999, #gone)))
end
return replies
