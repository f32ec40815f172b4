-- The original's add-buffer script, from its description (background/original.md e): one subsegment joins its segment.
--
-- KEYS     1: `project:trace`, which hashes as the tag of all keys that are made of it.
-- ARGV     1: spans. 2: id of the parent. 3: "true" when one is a root. 4: TTL, s. 5: bytes. 6: most bytes of a segment, 0: any.
--          7: salt. 8: "true" to look for locks. 9: one call in so many is measured. 10…: ids of the spans.
-- RETURNS  segment key, 1 or 0 for its root, latency (−1), ids of the former roots that were merged.
-- Cost     keys touched: 6, and 3 for each merged child; members of a child's index are copied.
local trace, spans, parent = KEYS[1], tonumber(ARGV[1]), ARGV[2]
local has_root, ttl, bytes, limit = ARGV[3] == "true", ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
local salt, check_lock, rate = ARGV[7], ARGV[8] == "true", tonumber(ARGV[9])
local FIRST, HOPS, PAGE = 10, 101, 1000

local sampled = tonumber(redis.call("time")[2]) % rate == 0

local function segment_key(id) return "span-buf:s:{" .. trace .. "}:" .. id end
local function index_key(id) return "span-buf:mk:{" .. trace .. "}:" .. id end

local redirects = "span-buf:ssr:{" .. trace .. "}"
local root = parent
for _ = 1, HOPS do
    local above = redis.call("hget", redirects, root)
    if not above or above == root then break end
    root = above
end
local segment, index = segment_key(root), index_key(root)

local root_flag = "span-buf:hrs:" .. segment
has_root = has_root or redis.call("get", root_flag) == "1"
if has_root then redis.call("setex", root_flag, ttl, "1") end

local pairs_, counters, children = {}, {}, {}
for place = FIRST, FIRST + spans - 1 do
    local id = ARGV[place]
    pairs_[#pairs_ + 1] = id
    pairs_[#pairs_ + 1] = root
    if id ~= parent then
        children[#children + 1] = id
        counters[#counters + 1] = "span-buf:ic:" .. segment_key(id)
        counters[#counters + 1] = "span-buf:ibc:" .. segment_key(id)
    end
end
redis.call("hset", redirects, unpack(pairs_))
redis.call("expire", redirects, ttl)

local held = tonumber(redis.call("get", "span-buf:ibc:" .. segment) or 0)
local counts = {}
if #counters > 0 then counts = redis.call("mget", unpack(counters)) end
for place = 1, #children do bytes = bytes + tonumber(counts[2 * place] or 0) end

if (limit > 0 and held + bytes > limit) or (check_lock and redis.call("exists", "span-buf:fl:" .. segment) == 1) then
    segment, index = segment_key(salt), index_key(salt)
end

local merged = {}
for place, id in ipairs(children) do
    local count = counts[2 * place - 1]
    if count then
        spans = spans + tonumber(count)
        redis.call("del", counters[2 * place - 1], counters[2 * place])
        local cursor, child = "0", index_key(id)
        repeat
            local page = redis.call("sscan", child, cursor, "count", PAGE)
            cursor = page[1]
            if #page[2] > 0 then redis.call("sadd", index, unpack(page[2])) end
        until cursor == "0"
        redis.call("del", child)
        merged[#merged + 1] = id
    end
end

redis.call("sadd", index, salt)
redis.call("expire", index, ttl)
local span_count, byte_count = "span-buf:ic:" .. segment, "span-buf:ibc:" .. segment
redis.call("incrby", span_count, spans)
redis.call("incrby", byte_count, bytes)
redis.call("expire", span_count, ttl)
redis.call("expire", byte_count, ttl)
return {segment, has_root and 1 or 0, sampled and 0 or -1, merged}
