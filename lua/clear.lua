-- Removes from journals of one bucket the entries that were produced or dropped, counts them, and queues what is left.
--
-- KEYS    1 queue (sorted set), 2 sum (hash), then a journal (hash) for each trace; all with one hash tag
-- ARGV    1 TTL of a journal, milliseconds
--         2 TTL of queue and sum, milliseconds
--         then for each journal: the trace's member in the queue; its next look, shard clock, milliseconds, empty: whoever inserted
--         what is left has queued it; the number of fields to remove; and for each of these: field, spans produced; or, in place of
--         the last one, `+`, spans produced, repeats, number of reasons, and for each of these: reason, spans dropped
-- RETURNS for each journal two values: fields that this call removed, or the error of a journal that is none;
--         and fields that are left
-- KEEPS   the sum gets the amounts of exactly the fields that this call removed, so a repeat adds nothing;
--         a journal that holds anything is in the queue, no later than its next look; a key of another type keeps back its own
--         trace alone
-- COST    two keys and one for each journal; one HDEL for each field; the caller bounds journals and fields

-- Locals: with one field a trace, a good part of a call's time is the interpreter's.
local keys, args, call, number = KEYS, ARGV, redis.call, tonumber
local key_count, end_of_args = #keys, #args + 1
assert(key_count >= 2 and end_of_args >= 3, 'clear.lua: 2 keys and 2 arguments expected')

-- All arguments are looked at before the first write: a call is carried out whole or not at all.
local counts = {}
-- Of each field the spans produced; false: there is more to count.
local amounts = {}
local fields = 0
local at = 3
for journal = 3, key_count do
  local count = number(args[at + 2])
  assert(count and count >= 0, 'clear.lua: a journal lacks its fields')
  counts[journal - 2] = count
  at = at + 3
  for _ = 1, count do
    local amount = number(args[at + 1])
    fields = fields + 1
    amounts[fields] = amount or false
    if amount then
      at = at + 2
    else
      local reasons = number(args[at + 4])
      assert(args[at + 1] == '+' and number(args[at + 2]) and number(args[at + 3]) and reasons and reasons >= 0,
        'clear.lua: a field lacks its amounts')
      at = at + 5 + 2 * reasons
    end
    assert(at <= end_of_args, 'clear.lua: a field lacks its reasons')
  end
end
assert(at == end_of_args, 'clear.lua: arguments without a journal')

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

at = 3
fields = 0
for place = 3, key_count do
  local journal = keys[place]
  local member, next_look = args[at], args[at + 1]
  local removed = 0
  at = at + 3
  -- Counted from here on, not asked: in a slot that is on its way to another node, nothing may touch a key that is no more.
  local left = redis.pcall('HLEN', journal)
  local is_journal = type(left) == 'number'
  for _ = 1, counts[place - 2] do
    fields = fields + 1
    local amount = amounts[fields]
    local is_removed = is_journal and left > 0 and call('HDEL', journal, args[at]) == 1
    if is_removed then
      removed = removed + 1
      left = left - 1
      all_produced = all_produced + (amount or 0)
    end
    if amount then
      at = at + 2
    else
      local reasons = number(args[at + 4])
      if is_removed then
        all_produced = all_produced + number(args[at + 2])
        add('repeats', number(args[at + 3]))
        for reason = at + 5, at + 4 + 2 * reasons, 2 do
          add('dropped:' .. args[reason], number(args[reason + 1]))
        end
      end
      at = at + 5 + 2 * reasons
    end
  end
  if is_journal then
    replies[replied + 1] = removed
    replies[replied + 2] = left
    if left == 0 then
      gone[#gone + 1] = member
    else
      call('PEXPIRE', journal, args[1])
      if next_look ~= '' then
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
