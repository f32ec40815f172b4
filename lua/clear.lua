-- Removes from journals of one bucket the entries that were produced or dropped, counts them, and queues what is left.
--
-- KEYS    1 queue (sorted set), 2 sum (hash), then a journal (hash) for each trace; all with one hash tag. What stands behind
--         `<hash tag>:t:` in a journal's name is the trace's member in the queue
-- ARGV    1 TTL of a journal, milliseconds
--         2 TTL of queue and sum, milliseconds
--         3 what goes, a JSON array: for each journal the number of its fields that go; its next look, shard clock, milliseconds, or
--           false: whoever inserted what is left has queued it; and for each field the spans produced; or, where there is more to
--           count, an array of spans produced, repeats, and an array of pairs, reason and spans dropped
--         4, … the fields of all journals, in the order of the journals
-- RETURNS for each journal two values: fields that this call removed, or the error of a journal that is none;
--         and fields that are left
-- KEEPS   the sum gets the amounts of exactly the fields that this call removed, so a repeat adds nothing;
--         a journal that holds anything is in the queue, no later than its next look; a key of another type keeps back its own
--         trace alone
-- COST    two keys and one for each journal; one HDEL for each field; the caller bounds journals and fields

-- Locals, and numbers in one argument: with one field a trace, nearly half of a call's time went into taking arguments over.
local keys, args, call = KEYS, ARGV, redis.call
local key_count = #keys
assert(key_count >= 2 and #args >= 3, 'clear.lua: 2 keys and 3 arguments expected')
local plan = cjson.decode(args[3])
assert(type(plan) == 'table', 'clear.lua: the third argument is an array')

-- All arguments are looked at before the first write: a call is carried out whole or not at all.
local function is_count(value)
  return type(value) == 'number' and value >= 0 and value % 1 == 0
end
local function is_amount(value)
  if type(value) ~= 'table' then
    return is_count(value)
  end
  local is_good = is_count(value[1]) and is_count(value[2]) and type(value[3]) == 'table'
  for _, dropped in ipairs(is_good and value[3] or {}) do
    is_good = is_good and type(dropped) == 'table' and type(dropped[1]) == 'string' and is_count(dropped[2])
  end
  return is_good
end
local at = 1
local fields = 0
for _ = 3, key_count do
  local count, next_look = plan[at], plan[at + 1]
  assert(is_count(count), 'clear.lua: a journal lacks its fields')
  assert(next_look == false or is_count(next_look), 'clear.lua: a journal lacks its next look')
  for place = at + 2, at + 1 + count do
    assert(is_amount(plan[place]), 'clear.lua: a field lacks its amounts')
  end
  at = at + 2 + count
  fields = fields + count
end
assert(at == #plan + 1 and #args == 3 + fields, 'clear.lua: fields without a journal, or none for an amount')

-- First write of all: EXPIRE is allowed on a full server, and lets the writes after it pass.
call('PEXPIRE', keys[1], args[2])
-- A sum that is none fails the call here, before anything is removed that could not be counted.
call('HLEN', keys[2])

local replies = {}
local replied = 0
local gone = {}
local lowered = {}
local all_produced = 0
local sums = {}
local function add(name, amount)
  if amount > 0 then
    sums[name] = (sums[name] or 0) + amount
  end
end

-- The trace's member begins behind `t:`, which stands where the queue's name has its `q`.
local member_at = #keys[1] + 2
at = 1
local field_at = 4
for place = 3, key_count do
  local journal = keys[place]
  local count, next_look = plan[at], plan[at + 1]
  local removed = 0
  -- Counted from here on, not asked: in a slot that is on its way to another node, nothing may touch a key that is no more.
  local left = redis.pcall('HLEN', journal)
  local is_journal = type(left) == 'number'
  for field = 0, is_journal and count - 1 or -1 do
    if left > 0 and call('HDEL', journal, args[field_at + field]) == 1 then
      removed = removed + 1
      left = left - 1
      local amount = plan[at + 2 + field]
      if type(amount) == 'number' then
        all_produced = all_produced + amount
      else
        all_produced = all_produced + amount[1]
        add('repeats', amount[2])
        for _, dropped in ipairs(amount[3]) do
          add('dropped:' .. dropped[1], dropped[2])
        end
      end
    end
  end
  at = at + 2 + count
  field_at = field_at + count
  if is_journal then
    replies[replied + 1] = removed
    replies[replied + 2] = left
    local member = string.sub(journal, member_at)
    if left == 0 then
      gone[#gone + 1] = member
    else
      call('PEXPIRE', journal, args[1])
      if next_look then
        lowered[#lowered + 1] = next_look
        lowered[#lowered + 1] = member
      end
    end
  else
    replies[replied + 1] = left.err
    replies[replied + 2] = 0
  end
  replied = replied + 2
end

-- What is removed is counted before anything else can fail.
add('produced', all_produced)
for name, amount in pairs(sums) do
  call('HINCRBY', keys[2], name, string.format('%.0f', amount))
end
call('PEXPIRE', keys[2], args[2])
-- Lua passes some 8,000 arguments at most. A trace that is named twice may be lowered first and gone then. The last of all may
-- take the queue's last member, and the queue with it.
for first = 1, #lowered, 4000 do
  call('ZADD', keys[1], 'LT', unpack(lowered, first, math.min(first + 3999, #lowered)))
end
if #lowered > 0 then
  call('PEXPIRE', keys[1], args[2])
end
for first = 1, #gone, 4000 do
  call('ZREM', keys[1], unpack(gone, first, math.min(first + 3999, #gone)))
end
return replies
