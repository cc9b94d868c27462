/* The words of kakusan.core.hashing in C, for a battery of statistical tests.

   generator words SEED LEVEL INDEX LANES                    print the two words of each lane
   generator small|crush FIRST LANES SEEDS TREE WORD REVERSED HASH [TEST...]
                                                             a battery of TestU01, on one ordering

   An ordering visits the places of a path in turn, at each place SEEDS seeds from FIRST on, and
   for each seed LANES lanes. Places are (0, 0), (0, 1), ... or, where TREE is 1, the nodes of a
   binary tree from its root. WORD is 1 or 2, for the first or second words alone, or 3 for both in
   turn. HASH is 0, or one of the controls that `word_pair` lists. TEST are numbers of single tests
   of Crush.
   benchmarks/generator.py compiles and runs this; without -DTESTU01 the batteries are left out. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef TESTU01
#include <testu01/bbattery.h>
#include <testu01/swrite.h>
#include <testu01/unif01.h>
#endif

enum { BLOCK = 4096 };

static uint64_t mixed(uint64_t h, uint64_t word)
{
    h += word + 0x9E3779B97F4A7C15u;
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9u;
    h = (h ^ (h >> 27)) * 0x94D049BB133111EBu;
    return h ^ (h >> 31);
}

static uint64_t key_of(uint64_t seed, uint64_t level, uint64_t index)
{
    return mixed(mixed(mixed(0, seed), level), index);
}

static inline uint32_t lowbias32(uint32_t x)
{
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

/* 0: the library's words. Controls: 1: the words a and b as they are, so that first words repeat
   one sequence; 2: half of the mixer; 3: a xor b and b. */
static inline void word_pair(int hash, uint32_t lane, uint64_t key, uint32_t *u, uint32_t *v)
{
    uint32_t a = lane + (uint32_t)key, b;
    if (hash == 2) {
        a = (a ^ (a >> 16)) * 0x7FEB352Du;
        a ^= a >> 15;
        b = (a ^ (uint32_t)(key >> 32)) * 0x846CA68Bu;
        b ^= b >> 16;
    } else {
        a = lowbias32(a);
        b = lowbias32(a ^ (uint32_t)(key >> 32));
    }
    if (hash == 0 || hash == 2)
        a ^= b << 16 | b >> 16;
    else if (hash == 3)
        a ^= b;
    *u = a;
    *v = b;
}

/* The stream of words in one ordering, made in blocks. */
static struct {
    uint32_t lanes, seeds, lane, seed;
    uint64_t first, place, key;
    int tree, word, reversed, hash;
    uint32_t at, block[2 * BLOCK + 2], filled;
} s;

static void next_key(void)
{
    uint64_t level = 0, index = s.place;
    if (s.tree) {
        level = 63 - (uint64_t)__builtin_clzll(s.place + 1);
        index = s.place + 1 - ((uint64_t)1 << level);
    }
    s.key = key_of(s.first + s.seed, level, index);
    if (++s.seed == s.seeds) {
        s.seed = 0;
        s.place++;
    }
}

static void fill(void)
{
    uint32_t u[BLOCK], v[BLOCK], n = 0, made = 0;
    while (made < BLOCK) {
        if (s.lane == 0)
            next_key();
        uint32_t m = s.lanes - s.lane, first = s.lane;
        if (m > BLOCK - made)
            m = BLOCK - made;
        for (uint32_t i = 0; i < m; i++)
            word_pair(s.hash, first + i, s.key, &u[made + i], &v[made + i]);
        made += m;
        s.lane = (s.lane + m) % s.lanes;
    }
    for (uint32_t i = 0; i < made; i++) {
        if (s.word & 1)
            s.block[n++] = u[i];
        if (s.word & 2)
            s.block[n++] = v[i];
    }
    if (s.reversed)
        for (uint32_t i = 0; i < n; i++) {
            uint32_t x = __builtin_bswap32(s.block[i]);
            x = (x & 0x0F0F0F0Fu) << 4 | (x >> 4 & 0x0F0F0F0Fu);
            x = (x & 0x33333333u) << 2 | (x >> 2 & 0x33333333u);
            s.block[i] = (x & 0x55555555u) << 1 | (x >> 1 & 0x55555555u);
        }
    s.at = 0;
    s.filled = n;
}

unsigned int next_word(void)
{
    if (s.at == s.filled)
        fill();
    return s.block[s.at++];
}

#ifdef TESTU01
static void battery(const char *name, int count, char **tests)
{
    unif01_Gen *gen = unif01_CreateExternGenBits("words", next_word);
    swrite_Basic = FALSE;
    if (!strcmp(name, "small"))
        bbattery_SmallCrush(gen);
    else if (count == 0)
        bbattery_Crush(gen);
    else {
        int repeat[1 + 96] = {0};
        for (int i = 0; i < count; i++)
            repeat[atoi(tests[i])] = 1;
        bbattery_RepeatCrush(gen, repeat);
    }
    for (int i = 0; i < bbattery_NTests; i++)
        printf("p %.6g %s\n", bbattery_pVal[i], bbattery_TestNames[i]);
    unif01_DeleteExternGenBits(gen);
}
#endif

int main(int argc, char **argv)
{
    if (argc == 6 && !strcmp(argv[1], "words")) {
        uint64_t key = key_of(strtoull(argv[2], 0, 10), strtoull(argv[3], 0, 10),
                              strtoull(argv[4], 0, 10));
        for (uint32_t lane = 0; lane < strtoul(argv[5], 0, 10); lane++) {
            uint32_t u, v;
            word_pair(0, lane, key, &u, &v);
            printf("%d %d\n", (int32_t)u, (int32_t)v);
        }
        return 0;
    }
#ifdef TESTU01
    if (argc >= 9 && (!strcmp(argv[1], "small") || !strcmp(argv[1], "crush"))) {
        s.first = strtoull(argv[2], 0, 10);
        s.lanes = strtoul(argv[3], 0, 10);
        s.seeds = strtoul(argv[4], 0, 10);
        s.tree = atoi(argv[5]);
        s.word = atoi(argv[6]);
        s.reversed = atoi(argv[7]);
        s.hash = atoi(argv[8]);
        battery(argv[1], argc - 9, argv + 9);
        return 0;
    }
#endif
    fprintf(stderr, "generator words|small|crush: see the head of generator.c\n");
    return 2;
}
